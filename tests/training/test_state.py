import json

import pytest

from megatron.training.state import TrainState


def test_state_survives_json():
    state = TrainState(iteration=3, consumed_samples=24, consumed_tokens=384, skipped_steps=1)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize("change", [{"iteration": -1}, {"iteration": 1.0}, {"iteration": True}, {"extra": 1}])
def test_state_refuses_what_is_no_count(change):
    with pytest.raises(ValueError, match="the state"):
        TrainState.from_json(TrainState().to_json() | change)


def test_progress_counts_in_each_unit():
    state = TrainState()
    state.advance(samples=4, tokens=64)
    assert [state.progress(unit) for unit in ("iterations", "samples", "tokens")] == [1, 4, 64]
