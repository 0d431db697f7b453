"""Compiles the CUDA kernels of `csrc`, once for each host and toolchain, and loads them.

    python -m megatron.kernels.build [--folder FOLDER] [--arch sm_80] [--arch ...] [NAME ...]

A kernel is a folder of `csrc`: CUDA C++ that takes addresses, sizes and a stream, and knows nothing of torch, with a
pybind11 module of the folder's name. What is compiled is kept by a hash of everything that went into it, written beside
its place and renamed; `lock.py` keeps the processes of a host from compiling the same thing at once.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from megatron.config.errors import UserError
from megatron.kernels.cache import cache_folder
from megatron.kernels.lock import host_lock

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Kernels compiled ahead of time, beside the package; looked at before the cache."""
SHARED_SOURCES = "include"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""What is compiled ahead of time, as far as the compiler knows it; on first use it is this host's GPU alone."""
DEVICE_FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC")
HOST_FLAGS = ("-O1", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden")
COMPILE_SECONDS = 600.0


class KernelBuildError(UserError, RuntimeError):
    """A kernel cannot be compiled or loaded here."""


@dataclass(frozen=True)
class Compiler:
    """A CUDA compiler and what it says of itself."""

    path: str
    version: str
    architectures: frozenset[str]


def kernel_names() -> list[str]:
    """Return the names of all kernels: the folders of `csrc` that hold bindings."""
    return sorted(path.parent.name for path in SOURCES.glob("*/bindings.cpp"))


@functools.cache
def find_compiler() -> Compiler:
    """Find nvcc: on PATH, or where the toolkit is installed.

    Raises:
        KernelBuildError: there is none, or it does not run.
    """
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        raise KernelBuildError(
            "the CUDA kernels need the compiler nvcc, which is neither on PATH nor in /usr/local/cuda/bin: install the "
            "CUDA toolkit, or run with --no-fused-kernels"
        )
    try:
        version = _output([path, "--version"]).strip().splitlines()[-1]
        known = _output([path, "--list-gpu-code"]).split()
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(f"{path} does not run: {error}; repair the CUDA toolkit") from error
    return Compiler(path, version, frozenset(known))


@functools.cache
def load_kernel(name: str) -> ModuleType:
    """Return a kernel's module for this host's GPU, compiled now if it never was.

    Raises:
        KernelBuildError: there is no GPU, no compiler, or the compiler refuses; the sentence says which.
    """
    return load_file(f"megatron_kernels.{name}", ensure_built(name, (_own_architecture(),), cache_folder()))


def load_kernels(names: Sequence[str]) -> None:
    """Make kernels ready for this host's GPU, several at a time where they have to be compiled.

    Raises:
        KernelBuildError: as `load_kernel`.
    """
    with _side_by_side() as pool:
        list(pool.map(load_kernel, names))


def _side_by_side() -> ThreadPoolExecutor:
    """Make what compiles one kernel a core at a time."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 2)


def build_all() -> None:
    """Make every kernel ready; see `load_kernels`."""
    load_kernels(kernel_names())


def load_file(name: str, path: Path) -> ModuleType:
    """Import the extension module `name`, whatever package stands before it, from a file.

    Raises:
        KernelBuildError: it cannot be loaded.
    """
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise KernelBuildError(f"{path} is no extension module of this Python: remove it")
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise KernelBuildError(f"the compiled kernel {path} does not load: {error}; remove it") from error
    return module


def ensure_built(name: str, architectures: Sequence[str], folder: Path) -> Path:
    """Return the compiled file of a kernel: made ahead of time, kept in `folder`, or compiled into it now.

    Raises:
        KernelBuildError: it has to be compiled and cannot be.
    """
    for place in (PREBUILT, folder):
        if (found := _find_built(name, architectures, place)) is not None:
            return found
    return build_kernel(name, architectures, folder)


def build_kernel(name: str, architectures: Sequence[str], folder: Path) -> Path:
    """Compile a kernel into `folder` unless that holds it; another process that is at it is waited for.

    Raises:
        KernelBuildError: the compiler is missing or refuses.
    """
    compiler = find_compiler()
    target = folder / f"{name}-{source_key(name)}-{_build_key(compiler, architectures)}"
    with host_lock(folder, name, f"compiling the kernel {name!r}"):
        if not (target / _file_name(name)).exists():
            started = time.monotonic()
            log.info("compiling the kernel %r for %s", name, ", ".join(architectures))
            _compile(name, architectures, compiler, target)
            log.info("compiled the kernel %r in %.0f s", name, time.monotonic() - started)
    return target / _file_name(name)


def source_key(name: str) -> str:
    """Hash what a kernel is made from, and the binary interface of this Python."""
    digest = hashlib.sha256(_abi().encode())
    for folder in (SHARED_SOURCES, name):
        for path in sorted((SOURCES / folder).iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _build_key(compiler: Compiler, architectures: Sequence[str]) -> str:
    """Hash what a kernel is compiled with and for."""
    parts = [compiler.version, *DEVICE_FLAGS, *HOST_FLAGS, _pybind11_version(), *sorted(architectures)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _find_built(name: str, architectures: Sequence[str], folder: Path) -> Path | None:
    """Find a file made from these sources, whatever the compiler, that holds code for all `architectures`."""
    for manifest in sorted(folder.glob(f"{name}-{source_key(name)}-*/manifest.json")):
        held = json.loads(manifest.read_text(encoding="utf-8"))["architectures"]
        if set(architectures) <= set(held):
            return manifest.parent / _file_name(name)
    return None


def _compile(name: str, architectures: Sequence[str], compiler: Compiler, target: Path) -> None:
    unknown = sorted(set(architectures) - compiler.architectures)
    if unknown:
        raise KernelBuildError(
            f"{compiler.path} ({compiler.version}) cannot compile for {', '.join(unknown)}: install a CUDA toolkit "
            "that can, or run with --no-fused-kernels"
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        parts = [(path, Path(scratch) / f"{path.stem}.o") for path in _sources(name)]
        commands = [_compile_command(compiler, path, to, architectures) for path, to in parts]
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(functools.partial(_run, name), commands))
        done = Path(scratch) / "done"
        done.mkdir()
        _run(name, [compiler.path, "-shared", "-o", str(done / _file_name(name)), *(str(to) for _, to in parts)])
        manifest = {"architectures": sorted(architectures), "compiler": compiler.version, "python": _abi()}
        (done / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(done, target)


def _sources(name: str) -> list[Path]:
    folder = SOURCES / name
    return [*sorted(folder.glob("*.cu")), folder / "bindings.cpp"]


def _compile_command(compiler: Compiler, path: Path, to: Path, architectures: Sequence[str]) -> list[str]:
    if path.suffix == ".cu":
        targets = [f"-gencode=arch={_virtual(name)},code={name}" for name in sorted(architectures)]
        return [compiler.path, *DEVICE_FLAGS, *targets, "-c", str(path), "-o", str(to)]
    includes = [f"-I{folder}" for folder in (_pybind11_include(), sysconfig.get_path("include"))]
    return [compiler.path, *HOST_FLAGS, *includes, "-c", str(path), "-o", str(to)]


def _virtual(architecture: str) -> str:
    return architecture.replace("sm_", "compute_")


def _run(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(f"the kernel {name!r} was not compiled: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
        log.error("%s\n%s", " ".join(command), "\n".join(lines))
        raise KernelBuildError(
            f"nvcc refused the kernel {name!r} ({first.strip()}): the whole output is in the log; run with "
            "--no-fused-kernels meanwhile"
        )


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _file_name(name: str) -> str:
    return f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _abi() -> str:
    return str(sysconfig.get_config_var("SOABI"))


def _pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise KernelBuildError(
            f"the CUDA kernels need pybind11's headers: {sys.executable} -m pip install pybind11"
        ) from None
    return str(pybind11.get_include())


def _pybind11_version() -> str:
    _pybind11_include()
    import pybind11

    return str(pybind11.__version__)


@functools.cache
def _own_architecture() -> str:
    import torch

    if not torch.cuda.is_available():
        raise KernelBuildError("the CUDA kernels need a GPU and torch sees none here: run with --no-fused-kernels")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _build_timed(name: str, *, architectures: Sequence[str], folder: Path) -> str:
    """Compile a kernel, and say how long it took and where it is."""
    started = time.monotonic()
    path = build_kernel(name, architectures, folder)
    return f"{name:14} {', '.join(architectures)}  {time.monotonic() - started:5.1f} s  {path}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile kernels and say where they are."""
    parser = argparse.ArgumentParser(prog="python -m megatron.kernels.build", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="kernels to compile; all of them without a name")
    parser.add_argument("--folder", type=Path, help="where to put them (default: the cache, MEGATRON_KERNEL_CACHE)")
    parser.add_argument(
        "--arch", action="append", help=f"a GPU to compile for, may be repeated (default: {' '.join(ARCHITECTURES)})"
    )
    options = parser.parse_args(arguments)
    names = options.names or kernel_names()
    try:
        known = find_compiler().architectures
        architectures = options.arch or [name for name in ARCHITECTURES if name in known]
        if unknown := sorted(set(names) - set(kernel_names())):
            raise KernelBuildError(f"{unknown[0]!r} is no kernel; there are {', '.join(kernel_names())}")
        with _side_by_side() as pool:
            build = partial(_build_timed, architectures=architectures, folder=options.folder or cache_folder())
            for line in pool.map(build, names):
                print(line, flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main()
