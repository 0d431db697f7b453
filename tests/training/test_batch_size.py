import pytest

from megatron.training.batch_size import BatchSize, steps_left
from megatron.training.state import TrainState


def sizes(batch, steps):
    consumed, found = 0, []
    for _ in range(steps):
        found.append(batch.at(consumed))
        consumed += found[-1]
    return found


def test_batch_is_constant_without_a_ramp():
    assert sizes(BatchSize.ramped(8, ()), 3) == [8, 8, 8]


def test_ramp_is_megatrons():
    """Start 4, two increments of 4 over 24 samples: 12 samples each; the end of the ramp still counts as inside it."""
    batch = BatchSize.ramped(12, (4, 4, 24))
    assert [batch.at(consumed) for consumed in (0, 11, 12, 23, 24, 25)] == [4, 4, 8, 8, 12, 12]
    assert sizes(batch, 6) == [4, 4, 4, 8, 8, 12]


def test_ramp_without_samples_or_increments_is_over_at_once():
    assert BatchSize.ramped(12, (4, 4, 0)).at(0) == 12
    assert BatchSize.ramped(12, (12, 4, 100)).at(0) == 12


@pytest.mark.parametrize("ramp", [(), (4, 4, 24), (2, 10, 7), (4, 8, 1000)])
def test_steps_and_samples_convert_into_each_other(ramp):
    batch = BatchSize.ramped(12, ramp)
    for steps in range(1, 40):
        samples = sum(sizes(batch, steps))
        assert batch.samples_of(steps) == samples
        assert batch.iterations_of(samples) == steps
        assert batch.iterations_of(samples - 1) == steps
        assert batch.iterations_of(samples + 1) == steps + 1


@pytest.mark.parametrize("ramp", [(), (4, 4, 24)])
@pytest.mark.parametrize("seq_length", [16, 40])
def test_the_steps_that_are_left_end_where_the_limits_are(ramp, seq_length):
    """Also when sequence length or batch size change on the way: what was consumed counts as it was."""
    batch = BatchSize.ramped(8, ramp)
    state = TrainState(iteration=3, consumed_samples=20, consumed_tokens=320)
    assert steps_left({}, batch, seq_length, state) is None
    assert steps_left({"iterations": 10}, batch, seq_length, state) == 7
    assert steps_left({"iterations": 2}, batch, seq_length, state) == 0
    for unit, limit in {"samples": 70, "tokens": 1000}.items():
        steps, consumed = 0, {"samples": 20, "tokens": 320}
        while consumed[unit] < limit:
            size = batch.at(consumed["samples"])
            consumed = {"samples": consumed["samples"] + size, "tokens": consumed["tokens"] + size * seq_length}
            steps += 1
        assert steps_left({unit: limit}, batch, seq_length, state) == steps
        assert steps_left({unit: limit, "iterations": 4}, batch, seq_length, state) == 1
        assert batch.samples_of(steps, 20) == consumed["samples"] - 20
