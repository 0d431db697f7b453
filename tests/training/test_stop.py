import os
import signal

import pytest

from megatron.config.training import TrainingConfig
from megatron.training.control import Control
from megatron.training.state import TrainState
from megatron.training.stop import SECONDS_OF_ONE_REQUEST, SignalFlag, StopRules
from tests.ranks import run_on_ranks


def rules(clock=lambda: 0.0, signals=None, **training):
    return StopRules(TrainingConfig(**training), Control.alone(), signals or SignalFlag(), clock=clock)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"train_iters": 10}, "--train-iters 10 is reached"),
        ({"train_samples": 39}, "--train-samples 39 is reached"),
        ({"train_tokens": 640}, "--train-tokens 640 is reached"),
        ({"skip_train": True}, "--skip-train"),
    ],
)
def test_limits_finish_the_training(flags, text):
    stop = rules(**flags).stop(TrainState(iteration=10, consumed_samples=40, consumed_tokens=640), stepped=True)
    assert stop.finished
    assert text in stop.reason
    assert stop.exit_code == 0


def test_nothing_stops_a_run_within_its_limits():
    state = TrainState(iteration=9, consumed_samples=36, consumed_tokens=576)
    run = rules(train_iters=10, train_samples=37, train_tokens=577, exit_interval=10, exit_duration_in_mins=1)
    assert run.stop(state, stepped=True) is None


def test_exit_interval_stops_after_a_step_and_not_at_the_start():
    run, state = rules(train_iters=100, exit_interval=5), TrainState(iteration=5)
    assert run.stop(state, stepped=False) is None
    stop = run.stop(state, stepped=True)
    assert "--exit-interval 5" in stop.reason
    assert not stop.finished


def test_wall_clock_stops():
    now = [0.0]
    run = rules(clock=lambda: now[0], train_iters=100, exit_duration_in_mins=2)
    now[0] = 119.0
    assert run.stop(TrainState(), stepped=True) is None
    now[0] = 120.0
    assert "--exit-duration-in-mins" in run.stop(TrainState(), stepped=True).reason


def test_kill_switch_file_stops(tmp_path):
    run = rules(train_iters=100, kill_switch_file=str(tmp_path / "stop"))
    assert run.stop(TrainState(), stepped=True) is None
    (tmp_path / "stop").touch()
    assert "kill-switch" in run.stop(TrainState(), stepped=True).reason


def test_bad_streak_stops_without_a_save():
    state = TrainState(iteration=7, consumed_samples=28, nonfinite_streak=3)
    assert rules(train_iters=100, max_nonfinite_steps=4).stop(state, stepped=True) is None
    assert rules(train_iters=100, max_nonfinite_steps=0).stop(state, stepped=True) is None
    stop = rules(train_iters=100, max_nonfinite_steps=3).stop(state, stepped=True)
    assert (stop.exit_code, stop.save) == (17, False)
    assert "iteration 7 (28 consumed samples)" in stop.reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_stops_with_143(number):
    with SignalFlag() as signals:
        run = rules(signals=signals, train_iters=100)
        assert run.stop(TrainState(), stepped=True) is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher and a scheduler that pass on the same request
        stop = run.stop(TrainState(), stepped=True)
        assert (stop.exit_code, stop.save) == (143, True)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_signal_that_comes_much_later_ends_the_process(monkeypatch):
    raised = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    now = iter([0.0, 1.0, SECONDS_OF_ONE_REQUEST + 0.1])
    monkeypatch.setattr("megatron.training.stop.time.monotonic", lambda: next(now))
    with SignalFlag():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert raised == [signal.SIGTERM]


def test_disabled_handler_leaves_the_signal_alone():
    with SignalFlag(enabled=False):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def stop_asked_on_rank_1():
    from datetime import timedelta

    control = Control.of_world(timedelta(seconds=30))
    with SignalFlag() as signals:
        run = StopRules(TrainingConfig(train_iters=100), control, signals)
        before = run.stop(TrainState(), stepped=True)
        if control.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before, run.stop(TrainState(), stepped=True).exit_code


def test_signal_to_one_rank_stops_all_at_the_same_step():
    assert run_on_ranks(2, stop_asked_on_rank_1) == [(None, 143)] * 2
