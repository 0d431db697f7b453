import pytest

from megatron.training.batch_size import BatchSize


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
