"""Why and when a run ends. Signals only set a flag; all ranks decide together, between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from megatron.config.training import TrainingConfig
from megatron.training.control import Control
from megatron.training.state import TrainState

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_BAD_RESULT = 17
EXIT_SIGNAL = 143

SECONDS_OF_ONE_REQUEST = 5.0
"""Signals this close together are one request: a launcher and a scheduler often both pass on the same one."""


@dataclass(frozen=True)
class Stop:
    """The decision to end the run.

    Attributes:
        finished: the training has reached its end, and is not merely interrupted.
    """

    reason: str
    exit_code: int = EXIT_DONE
    save: bool = True
    finished: bool = False


class SignalFlag:
    """Notes that the process was asked to end, by SIGTERM or SIGUSR1 (SLURM's `--signal`), while in its `with` block.

    The step and the save that are under way finish first. A signal that comes later than the first request ends the
    process at once.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._received: float | None = None
        self._previous: dict[int, object] = {}

    @property
    def received(self) -> bool:
        """Whether a signal came."""
        return self._received is not None

    def __enter__(self) -> SignalFlag:
        if self._enabled:
            self._previous = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = now
        elif now - self._received > SECONDS_OF_ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class StopRules:
    """All reasons to stop, asked between two steps.

    Reasons that every rank sees alike (the counters) need no communication; those that one rank may see alone (a
    signal, a file, a clock) cost one all-reduce of an integer on the host.
    """

    def __init__(
        self,
        training: TrainingConfig,
        control: Control,
        signals: SignalFlag,
        *,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._training = training
        self._control = control
        self._signals = signals
        self._clock = clock
        self._started = clock() if started is None else started
        minutes = training.exit_duration_in_mins
        self._requests = (  # the first that any rank sees wins
            (lambda: signals.received, Stop("a signal asked for it", EXIT_SIGNAL)),
            (self._kill_switch, Stop(f"the kill-switch file {training.kill_switch_file} exists")),
            (self._out_of_time, Stop(f"--exit-duration-in-mins {minutes} have passed")),
        )

    def stop(self, state: TrainState, *, stepped: bool) -> Stop | None:
        """Find the reason to stop now, the same on every rank, or None.

        Args:
            state: the counters.
            stepped: whether this process has made a step yet.
        """
        return (
            self._limit_reached(state) or self._bad_result(state) or self._requested() or self._interval(state, stepped)
        )

    def _limit_reached(self, state: TrainState) -> Stop | None:
        training = self._training
        if training.skip_train:
            return Stop("--skip-train is given", save=False, finished=True)
        for flag, limit, value in (
            ("--train-iters", training.train_iters, state.iteration),
            ("--train-samples", training.train_samples, state.consumed_samples),
            ("--train-tokens", training.train_tokens, state.consumed_tokens),
        ):
            if limit is not None and value >= limit:
                return Stop(f"{flag} {limit} is reached", finished=True)
        return None

    def _bad_result(self, state: TrainState) -> Stop | None:
        limit = self._training.max_nonfinite_steps
        if not limit or state.nonfinite_streak < limit:
            return None
        return Stop(
            f"loss or gradient was NaN or infinite in each of the last {state.nonfinite_streak} steps, up to iteration "
            f"{state.iteration} ({state.consumed_samples} consumed samples); nothing is saved: resume from the last "
            "checkpoint with a lower --lr, --clip-grad or other data, or allow more with --max-nonfinite-steps",
            EXIT_BAD_RESULT,
            save=False,
        )

    def _requested(self) -> Stop | None:
        seen = [len(self._requests) - index for index, (asked, _) in enumerate(self._requests) if asked()]
        agreed = self._control.largest(max(seen, default=0))
        return self._requests[len(self._requests) - agreed][1] if agreed else None

    def _interval(self, state: TrainState, stepped: bool) -> Stop | None:
        interval = self._training.exit_interval
        if interval and stepped and state.iteration % interval == 0:
            return Stop(f"iteration {state.iteration} is divisible by --exit-interval {interval}")
        return None

    def _kill_switch(self) -> bool:
        path = self._training.kill_switch_file
        return path is not None and self._control.is_first and Path(path).exists()

    def _out_of_time(self) -> bool:
        minutes = self._training.exit_duration_in_mins
        return minutes is not None and self._clock() - self._started >= 60 * minutes
