"""The benchmark of products in 8 bits: what it says without a GPU, and the sizes it measures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_sentence_says_so():
    tool = subprocess.run([sys.executable, TOOLS / "benchmark_fp8.py"], capture_output=True, text=True, check=False)
    assert tool.returncode == 1
    assert tool.stderr == "error: this tool measures a GPU and torch sees none here\n"


def test_the_three_products_of_a_weight_take_as_many_flops(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import benchmark_fp8

    sizes = benchmark_fp8.product_sizes(100, 7, 5)
    assert sizes == {"output": (100, 7, 5), "input gradient": (100, 5, 7), "weight gradient": (7, 5, 100)}


@pytest.mark.gpu
def test_it_prints_a_table():
    tool = subprocess.run(
        [sys.executable, TOOLS / "benchmark_fp8.py", "--tokens", "256", "--hidden", "128"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert tool.returncode == 0, tool.stderr
    assert "weight gradient" in tool.stdout
    assert "a block" in tool.stdout
