"""The benchmark of the kernels: what it says without a GPU, and its table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_sentence_says_so():
    tool = subprocess.run([sys.executable, TOOLS / "benchmark_kernels.py"], capture_output=True, text=True, check=False)
    assert tool.returncode == 1
    assert tool.stderr == "error: this tool measures a GPU and torch sees none here\n"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import benchmark_kernels

    return benchmark_kernels


def test_rates_and_ratios_are_those_of_the_times(tool):
    passes = {"forward": 1e-3, "backward": 3e-3, "both": 4e-3}
    record = {
        "name": "norm",
        "size": "1x2",
        "flops": 0.0,
        "bytes": {"forward": 1e9, "backward": 3e9, "both": 4e9},
        "copy_seconds": {"forward": 5e-4, "backward": 3e-3},
        "seconds": {"fused": passes, "eager": {name: 2 * time for name, time in passes.items()}},
        "host_seconds": {"fused": 5e-6, "eager": 1e-6},
        "peak_bytes": {"fused": 2**20, "eager": 2**21},
        "errors": (1e-3, 2e-3),
        "failures": {"liger": "RuntimeError: no"},
    }
    forward, backward, both, failure = tool.lines(record, 1e15)
    assert " ".join(forward.split()) == "norm 1x2 forward 1000.0 1000.0 1000 50.0% 2.00 - - -"
    assert " ".join(backward.split()[2:7]) == "backward 3000.0 3000.0 1000 100.0%"
    assert " ".join(both.split()[2:]) == "both 4000.0 4000.0 1000 87.5% 2.00 - - - 1.0e-03 2.0e-03 1 2 5"
    assert failure == "# liger: RuntimeError: no"
    assert list(tool.shortfalls(record)) == ["  norm 1x2 forward: 50.0 % of the copy's rate"]


def test_what_falls_short_is_named(tool):
    fast, slow = (dict.fromkeys(tool.PASSES, time) for time in (1e-3, 2e-3))
    record = {
        "name": "norm",
        "size": "1x2",
        "flops": 0.0,
        "copy_seconds": fast,
        "seconds": {"fused": slow, "liger": fast, "eager": {**fast, "both": 1.97e-3}},
        "errors": (3e-3, 2e-3),
    }
    assert list(tool.shortfalls(record)) == [
        "  norm 1x2 forward: 50.0 % of the copy's rate",
        "  norm 1x2 backward: 50.0 % of the copy's rate",
        "  norm 1x2: liger takes 0.50 of its time",
        "  norm 1x2: 3.0e-03 from fp64, plain torch 2.0e-03",
    ]


def test_matrix_bound_operations_have_a_rate_of_arithmetic(tool):
    record = {
        "name": "head_loss",
        "size": "1x2",
        "flops": 8e12,
        "bytes": dict.fromkeys(tool.PASSES, 1.0),
        "copy_seconds": {"forward": 1.0, "backward": 1.0},
        "seconds": {"fused": {"forward": 1e-2, "backward": 1e-2, "both": 2e-2}},
        "host_seconds": {"fused": 1.0},
        "peak_bytes": {"fused": 0.0},
        "errors": None,
        "failures": {},
    }
    *_, both = tool.lines(record, 8e14)
    assert "400 TFLOP/s    50.0%" in both
    assert not list(tool.shortfalls(record))
