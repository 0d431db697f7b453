"""The attention kernels compile for GPUs that are not there, and keep what they compute with in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


def compile_kernels(capability, size, options):
    """In a process of its own, where kernels are no longer the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    answer = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_flash", str(capability), str(size), json.dumps(options)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    return [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("capability", "size", "options"),
    [
        (80, 64, {}),
        (80, 128, {}),
        (90, 64, {}),
        (90, 128, {}),
        (90, 256, {}),
        (90, 80, {"length": 250}),
        (90, 128, {"documents": True, "heads": [4, 2]}),
    ],
)
def test_kernels_compile(capability, size, options):
    reports = compile_kernels(capability, size, options)
    assert len(reports) == (4 if size == 256 else 3)  # the gradients of so wide keys and values are made apart
    for report in reports:
        assert report["shared"] <= SHARED_BYTES[capability], report
        assert report["wgmma"] == (capability == 90), report
        assert report["stack"] <= (256 if options else 128), report
