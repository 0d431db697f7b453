"""What a resumed run is compared with, how closely, and what it says."""

import copy
import math

import pytest
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.data.batch import Batch
from megatron.parallel.groups import Group
from megatron.training.inputs import Lookahead
from megatron.training.proof import NextSamples
from megatron.training.schedule import LearningRate, Schedule, WeightDecay
from megatron.training.step_log import StepNumbers
from megatron.training.verify import BOUND, NORM_BOUND, Comparison, StepCheck, compare_runs
from tests.training.test_differences import sections

SCHEDULE = Schedule(
    learning_rate=LearningRate(unit="iterations", style="constant", peak=0.1),
    weight_decay=WeightDecay(unit="iterations", style="constant", start=0.0, end=0.0),
)


def described(words="", **changes):
    run = {
        "config": {
            k: v for k, v in sections("--precision fp32 " + words).items() if k not in ("checkpoint", "reporting")
        },
        "layout": {"data_parallel_size": 1},
        "schedule": SCHEDULE.to_json(),
        "order": {"start": 0, "num_samples": 10},
        "software": {"torch": "2.13", "device": "cpu"},
    }
    return copy.deepcopy(run | changes)


DRY = "--hidden-dropout 0 --attention-dropout 0 "
OTHER_SCHEDULE = Schedule(
    learning_rate=LearningRate(unit="iterations", style="constant", peak=0.2), weight_decay=SCHEDULE.weight_decay
)

TRAINING = [
    # this run, whether steps can be compared, what rounds otherwise
    (described(DRY), True, ""),
    (described(DRY + "--train-iters 500 --eval-interval 3"), True, ""),
    (described(DRY + "--zero-stage 3"), True, "--zero-stage 1 -> 3"),
    (described(DRY + "--attention-backend unfused"), True, "--attention-backend auto -> unfused"),
    (described(DRY, layout={"data_parallel_size": 2}), True, "data_parallel_size 1 -> 2"),
    (described(DRY, software={"torch": "2.14", "device": "cpu"}), True, "torch 2.13 -> 2.14"),
    (described(DRY + "--clip-grad 2"), False, "--clip-grad 1.0 -> 2.0"),
    (described(DRY + "--global-batch-size 2"), False, "--global-batch-size 1 -> 2"),
    (described("--hidden-dropout 0.2 --attention-dropout 0"), False, "--hidden-dropout 0.0 -> 0.2"),
    (described(DRY, schedule=OTHER_SCHEDULE.to_json()), False, "--lr 0.1 -> 0.2"),
    (described(DRY, order={"start": 5, "num_samples": 10}), False, "other samples"),
]


@pytest.mark.parametrize(("new", "comparable", "told"), TRAINING, ids=[row[2] or "the same" for row in TRAINING])
def test_steps_are_compared_where_the_run_is_the_same_but_for_rounding(new, comparable, told):
    found = compare_runs(described(DRY), new, in_training=True)
    assert (found.obstacle is None) == comparable
    assert told in ((found.rounding if comparable else found.obstacle) or "")
    assert bool(found.rounding) == (comparable and bool(told))


def test_masks_of_dropout_are_the_same_only_in_the_same_run_with_the_same_streams():
    same = described()
    assert compare_runs(same, described(), in_training=True) == Comparison(None, "", BOUND["fp32"])
    assert compare_runs(same, described(), in_training=True, same_streams=False).obstacle == "other masks of dropout"
    assert compare_runs(same, described("--zero-stage 3"), in_training=True).obstacle == "other masks of dropout"
    assert compare_runs(same, described("--zero-stage 3"), in_training=False).obstacle is None


def test_an_evaluation_of_the_next_samples_depends_on_the_samples_alone():
    assert compare_runs(
        described(), described("--lr 5 --clip-grad 3 --hidden-dropout 0.5"), in_training=False
    ) == Comparison(None, "", BOUND["fp32"])
    assert "--seed 1234 -> 1" in compare_runs(described(), described("--seed 1"), in_training=False).obstacle


def test_the_coarser_precision_gives_the_bound():
    found = compare_runs(described(), described("--precision bf16"), in_training=False)
    assert (found.bound, found.rounding) == (BOUND["bf16"], "--precision fp32 -> bf16")


LOSS, NORM = 2.5, 1.25
RECORDED = {step: StepNumbers.of(LOSS, NORM) for step in (11, 12, 13)}


def check(rounding="", exact_backward=True):
    said = []
    comparison = Comparison(None, rounding, BOUND["fp32"])
    return StepCheck(RECORDED, comparison, exact_backward=exact_backward, say=said.append), said


def test_equal_steps_are_told_at_the_first_and_the_last():
    steps, said = check()
    for iteration in (11, 12, 13, 14):
        steps.saw(iteration, StepNumbers.of(LOSS, NORM))
    assert [text.split(" is")[0] for text in said] == [" verified: iteration 11", " verified: iteration 13"]


@pytest.mark.parametrize("iteration", [11, 12])
@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nextafter(LOSS, 3), NORM), (LOSS, math.nextafter(NORM, 2)), (math.nan, NORM)]
)
def test_one_bit_ends_the_run(iteration, loss, norm):
    steps, _ = check()
    for before in range(11, iteration):
        steps.saw(before, RECORDED[before])
    with pytest.raises(CheckpointError, match=f"iteration {iteration} has the loss .* nothing was saved"):
        steps.saw(iteration, StepNumbers.of(loss, norm))


@pytest.mark.parametrize(
    ("loss", "norm", "passes"),
    [
        (LOSS * (1 + 0.9 * BOUND["fp32"]), NORM, True),
        (LOSS * (1 + 1.1 * BOUND["fp32"]), NORM, False),
        (LOSS, NORM * (1 - 0.9 * NORM_BOUND * BOUND["fp32"]), True),
        (LOSS, NORM * (1 - 1.1 * NORM_BOUND * BOUND["fp32"]), False),
        (math.nan, NORM, False),
        (LOSS, math.inf, False),
    ],
)
def test_another_layout_is_held_to_the_bound_in_its_first_step(loss, norm, passes):
    steps, said = check(rounding="--zero-stage 1 -> 3")
    if passes:
        steps.saw(11, StepNumbers.of(loss, norm))
        steps.saw(12, StepNumbers.of(7.0, 7.0))  # drifted apart
        assert "within rounding" in said[0]
    else:
        with pytest.raises(CheckpointError, match="it is not the same training"):
            steps.saw(11, StepNumbers.of(loss, norm))


def test_a_device_that_adds_gradients_up_in_any_order_has_the_same_loss_and_a_norm_within_rounding():
    steps, said = check(exact_backward=False)
    steps.saw(11, StepNumbers.of(LOSS, NORM * (1 + 1e-6)))
    assert "within rounding" in said[0]
    steps, _ = check(exact_backward=False)
    with pytest.raises(CheckpointError):
        steps.saw(11, StepNumbers.of(math.nextafter(LOSS, 3), NORM))


class Counting:
    """An engine whose loss is the sum of the labels that count."""

    device = torch.device("cpu")

    def evaluate(self, batches):
        self.with_mask = [batch.loss_mask is not None for batch in batches]
        masks = [torch.ones_like(batch.labels) if batch.loss_mask is None else batch.loss_mask for batch in batches]
        total = sum((batch.labels * mask).sum() for batch, mask in zip(batches, masks, strict=True))
        return total.double(), sum(mask.sum() for mask in masks)


def batches_of(rank, ranks, size):
    """Sample i is three tokens of the value i."""
    first = rank * size
    while True:
        labels = torch.arange(first, first + size)[:, None].expand(-1, 3)
        yield Batch(tokens=labels, labels=labels)
        first += ranks * size


@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2), (8, 1)])
@pytest.mark.parametrize("count", [None, 1, 6, 7])
def test_every_layout_measures_the_same_next_samples_and_takes_none(ranks, size, count):
    found = []
    for rank in range(ranks):
        engine, batches = Counting(), Lookahead(batches_of(rank, ranks, size))
        group = Group(ranks=tuple(range(ranks)), rank=rank, handle=None)
        measured = NextSamples(engine, batches, micro_batch_size=size, data=group).measure(count)
        found.append((float.fromhex(measured["loss_sum"]), measured["tokens"]))
        assert measured["samples"] == (count or ranks * size)
        assert set(engine.with_mask) == {measured["samples"] % (ranks * size) != 0}
        assert next(batches).labels[0, 0] == rank * size, "they are still to be trained on"
    assert sum(total for total, _ in found) == 3 * sum(range(measured["samples"]))
    assert sum(tokens for _, tokens in found) == 3 * measured["samples"]
