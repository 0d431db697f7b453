"""Tests marked `gpu` are skipped where there are too few devices: `@pytest.mark.gpu`, or `@pytest.mark.gpu(2)`.

Where there is none, Triton's kernels run in its interpreter, which must be chosen before Triton is imported.
"""

import os

import pytest


def pytest_configure(config):
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    import torch

    needed = marker.args[0] if marker.args else 1
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA device(s)")
