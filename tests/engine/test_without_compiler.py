"""torch's compiler, whose import takes seconds of each start, is not loaded by runs that have no use for it."""

import sys

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from megatron.engine.without_compiler import keep_off_optimizers
from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, run

MOCK = [*FLAGS, "--mock-data", "--vocab-size", "64", "--train-iters", "3"]


def loaded_by_a_run(folder, words):
    assert run([*MOCK, *words, "--save", str(folder), "--save-interval", "2"]) == 0
    return "torch._dynamo" in sys.modules


@pytest.mark.parametrize(
    "words", ["--precision bf16", "--precision fp32 --zero-stage 0", "--optimizer sgd --zero-stage 2"]
)
def test_a_run_loads_no_compiler(tmp_path, words):
    assert run_on_ranks(1, loaded_by_a_run, tmp_path, words.split(), initialize=False, deepspeed=True) == [False]


def weights_after_steps(kind, **options):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = kind([weight], lr=0.1, **options)
    for _ in range(3):
        (weight * torch.arange(5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    return weight.detach()


CASES = [(Adam, {}), (AdamW, {"weight_decay": 0.1}), (SGD, {"momentum": 0.9})]


def steps(kept_off):
    if kept_off:
        keep_off_optimizers()
    return [weights_after_steps(kind, **options) for kind, options in CASES], "torch._dynamo" in sys.modules


def test_optimizers_step_as_they_do_with_it():
    (expected, was_loaded), (found, is_loaded) = (run_on_ranks(1, steps, kept_off)[0] for kept_off in (False, True))
    assert (was_loaded, is_loaded) == (True, False)
    assert all(map(torch.equal, found, expected))
