"""Constants are those of `torch.compile` too, and cost no import of it."""

import subprocess
import sys

import torch

from megatron.kernels.constant import COMPILERS_MARK, cached_constant


def test_the_compilers_mark_is_the_one_that_torch_sets():
    def function():
        return None

    torch.compiler.assume_constant_result(function)
    assert vars(function) == {COMPILERS_MARK: True}


def test_a_constant_is_made_once():
    made = []

    @cached_constant(maxsize=1)
    def make(size):
        made.append(size)
        return torch.zeros(size)

    assert make(3) is make(3)
    assert made == [3]
    assert getattr(make, COMPILERS_MARK)


def test_a_run_that_compiles_nothing_does_not_import_the_compiler():
    code = "import sys, megatron.training.build; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
