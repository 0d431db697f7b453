import json
import math

import pytest

from megatron.config.optimizer import OptimizerConfig
from megatron.config.training import TrainingConfig
from megatron.training.schedule import LearningRate, Schedule, WeightDecay, build_learning_rate, build_weight_decay

PEAK, LOW, START = 1e-2, 1e-3, 1e-4


def schedule(style, **changes):
    values = {"unit": "iterations", "peak": PEAK, "minimum": LOW, "initial": START, "warmup": 10, "length": 110}
    return LearningRate(style=style, **(values | changes))


def megatron(style, step, *, warmup=10, length=110, wsd=None, wsd_length=0):
    """Megatron-LM's scheduler as its documentation states it, written down anew for these constants."""
    if warmup > 0 and step <= warmup:
        return START + (PEAK - START) * step / warmup
    if style == "constant":
        return PEAK
    if step > length:
        return LOW
    if style == "inverse-square-root":
        return max(LOW, PEAK * max(warmup, 1) ** 0.5 / max(step, 1) ** 0.5)
    ratio = (step - warmup) / (length - warmup)
    if style == "WSD":
        left = length - wsd_length
        ratio = max(0.0, (step - left) / wsd_length)
    shape = {
        "linear": 1 - ratio,
        "cosine": (math.cos(math.pi * ratio) + 1) / 2,
        "exponential": 2 * 0.5**ratio - 1,
        "minus_sqrt": 1 - math.sqrt(ratio),
    }[wsd or style]
    return LOW + shape * (PEAK - LOW)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
def test_learning_rate_follows_megatron(style, warmup):
    ours = schedule(style, warmup=warmup)
    for step in range(0, 130):
        assert ours.at(step) == pytest.approx(megatron(style, step, warmup=warmup), rel=1e-14)


@pytest.mark.parametrize("shape", ["exponential", "linear", "cosine", "minus_sqrt"])
def test_wsd_follows_megatron(shape):
    ours = schedule("WSD", wsd_style=shape, wsd_length=30)
    for step in range(0, 130):
        assert ours.at(step) == pytest.approx(megatron("WSD", step, wsd=shape, wsd_length=30), rel=1e-14)
    assert ours.at(80) == pytest.approx(PEAK)
    assert ours.at(110) == pytest.approx(LOW)


def test_boundaries_of_the_warm_up_and_the_decay():
    ours = schedule("cosine")
    assert ours.at(0) == START
    assert ours.at(10) == PEAK
    assert ours.at(11) < PEAK
    assert ours.at(110) == pytest.approx(LOW)
    assert ours.at(111) == ours.at(10**9) == LOW
    assert schedule("linear", warmup=0).at(0) == pytest.approx(PEAK)


@pytest.mark.parametrize(("style", "middle"), [("linear", 0.2), ("cosine", 0.2)])
def test_weight_decay_ramps_from_start_to_end(style, middle):
    ramp = WeightDecay(unit="iterations", style=style, start=0.1, end=0.3, length=100)
    assert ramp.at(0) == pytest.approx(0.1)
    assert ramp.at(50) == pytest.approx(middle)
    assert ramp.at(100) == pytest.approx(0.3)
    assert ramp.at(101) == 0.3
    quarter = {"linear": 0.25, "cosine": 0.5 * (math.cos(math.pi * 0.75) + 1)}[style]
    assert ramp.at(25) == pytest.approx(0.1 + 0.2 * quarter)


def test_constant_weight_decay_needs_no_length():
    assert WeightDecay(unit="iterations", style="constant", start=0.1, end=0.1).at(10**6) == 0.1


def test_schedule_counts_in_the_unit_of_its_flags():
    optimizer = OptimizerConfig(lr=1e-3, lr_decay_tokens=1000, lr_warmup_tokens=100)
    ours = build_learning_rate(optimizer, TrainingConfig(train_iters=50))
    assert (ours.unit, ours.length, ours.warmup) == ("tokens", 1000, 100)


def test_schedule_ends_with_the_training_when_it_has_no_length_of_its_own():
    ours = build_learning_rate(OptimizerConfig(lr=1e-3, lr_warmup_fraction=0.1), TrainingConfig(train_samples=200))
    assert (ours.unit, ours.length, ours.warmup) == ("samples", 200, 20)


def test_weight_decay_ramps_over_the_training():
    optimizer = OptimizerConfig(
        lr=1e-3, start_weight_decay=0.0, end_weight_decay=0.1, weight_decay_incr_style="linear", lr_decay_samples=7
    )
    ours = build_weight_decay(optimizer, TrainingConfig(train_iters=50))
    assert (ours.unit, ours.length, ours.start, ours.end) == ("iterations", 50, 0.0, 0.1)


def whole(unit="iterations", length=110, decay=None, **changes):
    decay = decay or WeightDecay(unit=unit, style="constant", start=0.1, end=0.1, length=length)
    return Schedule(
        learning_rate=schedule(changes.pop("style", "cosine"), unit=unit, length=length, **changes), weight_decay=decay
    )


@pytest.mark.parametrize("style", ["constant", "cosine", "WSD"])
def test_a_schedule_comes_back_from_json(style):
    one = whole(style=style, length=math.inf)
    assert Schedule.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        (whole(), whole(), []),
        (whole(), whole(peak=0.5), ["--lr 0.01 -> 0.5"]),
        (whole(), whole(minimum=0.0), ["--min-lr 0.001 -> 0.0"]),
        (whole(), whole(length=200), ["--lr-decay-iters (without it --train-iters) 110 -> 200"]),
        (whole(style="constant"), whole(style="constant", length=200, minimum=0.0), []),
        (whole(), whole(warmup=5), ["--lr-warmup-iters 10 -> 5"]),
        (whole(warmup=0), whole(warmup=0, initial=0.0), []),
        (whole(), whole(wsd_length=5), []),
        (
            whole(style="WSD", wsd_length=5),
            whole(style="WSD", wsd_length=6, wsd_style="linear"),
            ["--lr-wsd-decay-style exponential -> linear", "--lr-wsd-decay-iters 5 -> 6"],
        ),
        (
            whole(style="constant", warmup=0),
            whole(style="linear", warmup=0, unit="samples"),
            [
                "--lr-decay-style constant -> linear",
                "--min-lr nothing -> 0.001",
                "--lr-decay-samples (without it --train-samples) nothing -> 110",
            ],
        ),
        (
            whole(decay=WeightDecay(unit="iterations", style="linear", start=0.0, end=0.1, length=100)),
            whole(decay=WeightDecay(unit="iterations", style="linear", start=0.0, end=0.1, length=200)),
            ["--train-iters 100 -> 200"],
        ),
        (
            whole(),
            whole(decay=WeightDecay(unit="iterations", style="constant", start=0.2, end=0.2, length=7)),
            ["--weight-decay 0.1 -> 0.2"],
        ),
    ],
)
def test_schedules_differ_where_their_values_do(old, new, changes):
    assert old.changes(new) == changes
    assert (old.changes(new) == []) == (new.changes(old) == [])
