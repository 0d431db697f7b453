"""A run saved in any layout goes on in any other: the same tensors, and the losses of the run that was not stopped."""

import pytest

from tests.layouts import reshape
from tests.layouts.reshape import Layout, Pair

SEED = 5
PAIRS = reshape.draw(20, SEED)

HALF = [
    Pair(
        "gpt2",
        Layout(2, "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1 --precision bf16"),
        Layout(2, "--pipeline-model-parallel-size 2 --zero-stage 1 --precision bf16"),
    ),
    Pair(
        "llama",
        Layout(4, "--tensor-model-parallel-size 2 --zero-stage 3 --precision bf16"),
        Layout(2, "--zero-stage 2 --cpu-optimizer --precision fp16 --initial-loss-scale 256"),
    ),
    Pair(
        "llama tied, query norms",
        Layout(2, "--pipeline-model-parallel-size 2 --precision fp16 --initial-loss-scale 65536 --loss-scale-window 2"),
        Layout(2, "--pipeline-model-parallel-size 2 --precision fp16 --initial-loss-scale 1 --loss-scale-window 2"),
    ),
]
"""Half precision, into another one too; the last pair is of one layout, and its loss scale has grown."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    pairs = [*PAIRS, *HALF]
    return dict(zip(pairs, reshape.train_pairs(pairs, tmp_path_factory.mktemp("reshape")), strict=True))


def test_the_pairs_have_what_is_hard_in_them():
    def some(condition):
        return any(condition(pair, pair.first.flags, pair.second.flags) for pair in PAIRS)

    def tensor(flags):
        return int(flags.split("--tensor-model-parallel-size ")[1].split()[0])

    def stages(flags):
        return int(flags.split("--pipeline-model-parallel-size ")[1].split()[0])

    assert some(lambda pair, first, second: pair.first == pair.second)
    assert some(lambda pair, first, second: "--zero-stage 3" in first and tensor(first) > 1 and first != second)
    assert some(lambda pair, first, second: "--zero-stage 3" in second and tensor(second) > 1 and first != second)
    assert some(lambda pair, first, second: stages(first) == 1 < stages(second))
    assert some(lambda pair, first, second: stages(second) == 1 < stages(first))
    assert some(lambda pair, first, second: ("--cpu-optimizer" in first) != ("--cpu-optimizer" in second))
    assert some(lambda pair, first, second: ("--remote-device" in first) != ("--remote-device" in second))
    assert some(lambda pair, first, second: "ulysses" not in first and first != second)
    for model in reshape.MODELS:  # tied and untied, with fewer key/value heads than ranks
        assert some(lambda pair, first, second, model=model: pair.model == model and first != second)
    assert some(lambda pair, first, second: "one key" in pair.model and tensor(first) != tensor(second))


def test_every_tensor_and_moment_is_the_one_that_was_saved(outcomes):
    for pair, outcome in outcomes.items():
        assert not outcome.differences, (pair, outcome.differences)


def test_losses_go_on_as_if_nothing_had_happened(outcomes):
    for pair in PAIRS:
        outcome = outcomes[pair]
        if pair.first == pair.second:
            assert outcome.resumed == outcome.straight, pair
        else:
            assert outcome.resumed == pytest.approx(outcome.straight, rel=1e-5), pair


def test_half_precision_goes_on_within_its_rounding_and_with_its_loss_scale(outcomes):
    for pair in HALF[:2]:
        assert outcomes[pair].resumed == pytest.approx(outcomes[pair].straight, rel=1e-2), pair
    assert outcomes[HALF[2]].resumed == outcomes[HALF[2]].straight
