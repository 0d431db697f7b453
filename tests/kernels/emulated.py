"""Kernels of `csrc` compiled for the CPU, their threads run one after the other: see `emulation/emulation.h`."""

import fcntl
import functools
import hashlib
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from megatron.kernels import build

EMULATION = Path(__file__).parent / "emulation"
TOOLKIT = Path("/usr/local/cuda/include")
LINK = ["g++", "-shared", "-Wl,-Bsymbolic"]
"""Its own stand-ins for CUDA's functions come first, also where PyTorch has loaded the real ones."""


def why_not() -> str | None:
    """Say why kernels cannot be emulated here; None when they can."""
    if shutil.which("g++") is None:
        return "needs g++"
    return None if (TOOLKIT / "cuda_runtime.h").exists() else "needs the CUDA toolkit's headers"


@functools.cache
def emulated_kernel(name: str) -> ModuleType:
    """Compile a kernel for the CPU, once for all processes of the session, and load it."""
    key = hashlib.sha256(
        (EMULATION / "emulation.h").read_bytes() + f"{LINK} {build.source_key(name)}".encode()
    ).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / "megatron-emulated" / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(name, target)
    return build.load_file(f"emulated_kernels.{name}", target)


def _compile(name: str, target: Path) -> None:
    includes = [f"-I{TOOLKIT}", f"-I{build._pybind11_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["g++", "-O0", "-std=c++17", "-fPIC", "-w", *includes]
    source = build.SOURCES / name
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        emulate = ["-include", str(EMULATION / "emulation.h"), "-x", "c++"]
        kernel, bindings = Path(scratch) / "kernel.o", Path(scratch) / "bindings.o"
        jobs = [
            subprocess.Popen([*flags, *emulate, "-c", str(source / f"{name}.cu"), "-o", str(kernel)]),
            subprocess.Popen([*flags, "-c", str(source / "bindings.cpp"), "-o", str(bindings)]),
        ]
        assert [job.wait() for job in jobs] == [0, 0], f"{name} does not compile for the CPU"
        made = Path(scratch) / target.name
        subprocess.run([*LINK, "-o", str(made), str(kernel), str(bindings)], check=True)
        made.replace(target)
