"""Kernels are compiled once for each host and toolchain; what stands in the way is said in a sentence."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron.kernels import build
from megatron.kernels.build import Compiler, KernelBuildError, build_kernel, ensure_built, kernel_names, source_key
from megatron.kernels.cache import cache_folder
from megatron.kernels.lock import describe_owner, host_lock

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SPAWN = multiprocessing.get_context("spawn")


def test_the_cache_is_where_the_environment_says():
    assert cache_folder({"MEGATRON_KERNEL_CACHE": "/somewhere"}) == Path("/somewhere")
    assert cache_folder({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/megatron/kernels")
    assert cache_folder({}) == Path.home() / ".cache/megatron/kernels"


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_a_kernel_compiles_loads_and_is_not_compiled_again(tmp_path, monkeypatch):
    path = build_kernel("rotary", ["sm_90"], tmp_path)
    module = build.load_file("megatron_kernels.rotary", path)
    assert callable(module.rotate)
    assert json.loads((path.parent / "manifest.json").read_text())["architectures"] == ["sm_90"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == [path.parent.name], "nothing is left over"
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build_kernel("rotary", ["sm_90"], tmp_path) == path
    monkeypatch.setattr(build, "find_compiler", lambda: pytest.fail("looked for a compiler"))
    assert ensure_built("rotary", ["sm_90"], tmp_path) == path
    # No GPU here: the launch itself fails, in words.
    if not torch.cuda.is_available():
        here = (0, 1, 1, 1, 1)
        with pytest.raises(RuntimeError, match="failed on the GPU"):
            module.rotate(((here, here, 1, 1, True),), 0, 0, 0, 1, 1, 16, 16, False, 1.0, 0, 0, 0)


def test_every_kernel_has_sources_and_a_header_of_its_name():
    assert set(kernel_names()) >= {"norm", "rotary", "activation", "cross_entropy", "dropout"}
    for name in kernel_names():
        assert (build.SOURCES / name / f"{name}.cu").exists()
        assert (build.SOURCES / name / f"{name}.h").exists()


def test_the_key_follows_sources_compiler_flags_and_architectures(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    for name in ("include", "some"):
        (tmp_path / name).mkdir()
    source, header = tmp_path / "some" / "some.cu", tmp_path / "include" / "shared.cuh"
    source.write_text("first")
    header.write_text("first")
    keys = {source_key("some")}
    source.write_text("second")
    keys.add(source_key("some"))
    header.write_text("second")
    keys.add(source_key("some"))
    assert len(keys) == 3
    old, new = (Compiler("nvcc", version, frozenset()) for version in ("V13.0", "V13.1"))
    build_keys = {build._build_key(old, ["sm_80"]), build._build_key(new, ["sm_80"]), build._build_key(old, ["sm_90"])}
    monkeypatch.setattr(build, "DEVICE_FLAGS", ("-O0",))
    build_keys.add(build._build_key(old, ["sm_80"]))
    assert len(build_keys) == 4


def test_kernels_compiled_ahead_of_time_serve_every_architecture_they_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    made = tmp_path / "prebuilt" / f"norm-{source_key('norm')}-anything"
    made.mkdir(parents=True)
    (made / "manifest.json").write_text(json.dumps({"architectures": ["sm_80", "sm_90"]}))
    assert ensure_built("norm", ["sm_90"], tmp_path / "cache").parent == made
    monkeypatch.setattr(build, "build_kernel", lambda *_: "compiled")
    assert ensure_built("norm", ["sm_100"], tmp_path / "cache") == "compiled"


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    build.find_compiler.cache_clear()
    with pytest.raises(KernelBuildError, match=r"need the compiler nvcc.*--no-fused-kernels"):
        build.find_compiler()
    build.find_compiler.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence():
    with pytest.raises(KernelBuildError, match="need a GPU and torch sees none here"):
        build.load_kernel("norm")


def test_an_architecture_that_the_compiler_does_not_know_is_one_sentence(tmp_path):
    compiler = Compiler("/bin/nvcc", "V13.0", frozenset({"sm_90"}))
    with pytest.raises(KernelBuildError, match=r"/bin/nvcc \(V13.0\) cannot compile for sm_30"):
        build._compile("norm", ["sm_30"], compiler, tmp_path / "norm")


def test_what_the_compiler_refuses_is_told_by_its_first_error(tmp_path):
    refusing = tmp_path / "nvcc"
    refusing.write_text("#!/bin/sh\necho 'note: here'\necho 'norm.cu(1): error: no such thing' >&2\nexit 1\n")
    refusing.chmod(0o755)
    compiler = Compiler(str(refusing), "V13.0", frozenset({"sm_90"}))
    with pytest.raises(KernelBuildError, match=r"refused the kernel 'norm' \(norm.cu\(1\): error: no such thing\)"):
        build._compile("norm", ["sm_90"], compiler, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["nvcc"]


def hold(folder, held):
    with host_lock(Path(folder), "some", "compiling"):
        held.set()
        time.sleep(60)


def test_a_lock_names_its_owner_and_dies_with_it(tmp_path):
    held = SPAWN.Event()
    owner = SPAWN.Process(target=hold, args=(str(tmp_path), held))
    owner.start()
    assert held.wait(30)
    (path,) = tmp_path.iterdir()
    assert f"process {owner.pid} on {os.uname().nodename}, which has been compiling since" in describe_owner(path)
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    with host_lock(tmp_path, "some", "testing"):
        assert f"process {os.getpid()} " in describe_owner(path)
    assert describe_owner(path) == "another process"


def wait_for_lock(folder, got):
    with host_lock(Path(folder), "some", "waiting"):
        got.set()


def test_a_lock_is_waited_for_while_its_owner_lives(tmp_path):
    got = SPAWN.Event()
    with host_lock(tmp_path, "some", "testing"):
        waiting = SPAWN.Process(target=wait_for_lock, args=(str(tmp_path), got))
        waiting.start()
        assert not got.wait(3)
    assert got.wait(30)
    waiting.join()


def test_the_tool_says_what_is_wrong(capsys):
    with pytest.raises(SystemExit, match="error: 'nothing' is no kernel; there are activation, ") as stopped:
        build.main(["nothing"])
    assert stopped.value.code != 0


def test_a_kernel_may_be_named_after_the_architectures(monkeypatch, capsys, tmp_path):
    compiler = Compiler(path=tmp_path, version="any", architectures=frozenset({"sm_80", "sm_90"}))
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    monkeypatch.setattr(build, "build_kernel", lambda name, architectures, folder: folder / name)
    build.main(["--folder", str(tmp_path), "--arch", "sm_90", "--arch", "sm_80", "norm", "rotary"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [[name, "sm_90,", "sm_80"] for name in ("norm", "rotary")]
