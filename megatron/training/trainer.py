"""The training loop. The order on the page is the order in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from megatron.checkpoint.store import Saved
from megatron.engine.interface import Engine, MicroBatch
from megatron.training.batch_size import BatchSize
from megatron.training.evaluate import evaluate
from megatron.training.metrics import Interval, SpeedModel, memory_gib
from megatron.training.report import Reporter
from megatron.training.schedule import Schedule
from megatron.training.start_up import StartUp
from megatron.training.state import TrainState
from megatron.training.stop import SignalFlag, Stop, StopRules
from megatron.training.timers import Timers

Batches = Iterator[MicroBatch]


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often things happen, in steps; None and 0 are never."""

    log: int
    evaluate: int
    save: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to do: pure functions of the counters, and constants.

    Attributes:
        samples_per_micro_step: samples that all ranks together take through the model at once.
        evaluation_steps: global batches of one evaluation.
        total_iterations: where the training ends, or None when only a request ends it.
        total_samples: the same in samples.
        lowest_loss_scale: an overflow at a higher scale is fp16's search for one, not a bad result.
    """

    batch_size: BatchSize
    schedule: Schedule
    speed: SpeedModel
    cadence: Cadence
    samples_per_micro_step: int
    evaluation_steps: int
    total_iterations: int | None
    total_samples: int | None
    lowest_loss_scale: float = 1.0


class Checkpoints(Protocol):
    """Keeps what a later run needs to continue this one. Each call tells of what is kept for good since the last."""

    def save(self, engine: Engine, state: TrainState) -> list[Saved]:
        """Keep it, or begin to while the training goes on."""

    def poll(self) -> list[Saved]:
        """Look whether what was begun is done, or failed."""

    def finish(self) -> list[Saved]:
        """Wait until what was begun is done."""


class Trainer:
    """A run: trains until there is a reason to stop.

    Args:
        plan: what to do.
        state: where to start; changes with every step.
        engine: trains.
        training_batches: this rank's micro-batches from `state` on, without end.
        held_out: by the names "validation" and "test", how to open this rank's micro-batches from the first one on.
        rules: when to stop.
        signals: what asks the process to stop.
        reporter: whom to tell.
        checkpoints: what saves; None saves nothing.
        params_norm: measures the weights for each report; None leaves it out.
        watch: told iteration, loss and gradient norm of each step, one step late; None tells nobody.
        start: counts the time to the end of the first step.
        resources: closed when the run ends, whichever way.

    Attributes:
        peak_gib: most memory that this rank held until the last report.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        state: TrainState,
        engine: Engine,
        training_batches: Batches,
        held_out: Mapping[str, Callable[[], Batches]],
        rules: StopRules,
        signals: SignalFlag,
        reporter: Reporter,
        checkpoints: Checkpoints | None,
        params_norm: Callable[[], float] | None,
        watch: Callable[[int, float, float], None] | None,
        start: StartUp,
        resources: ExitStack,
    ) -> None:
        self.plan = plan
        self.state = state
        self.engine = engine
        self.peak_gib = 0.0
        self._training_batches = training_batches
        self._held_out = held_out
        self._rules = rules
        self._signals = signals
        self._reporter = reporter
        self._checkpoints = checkpoints
        self._params_norm = params_norm
        self._watch = watch
        self._start = start
        self._resources = resources
        self._timers = Timers()
        self._interval = Interval(plan.lowest_loss_scale, watch)
        self._first_iteration = self._saved_at = state.iteration
        self._evaluated_at = -1

    def fit(self) -> int:
        """Train, and return the exit code of the process."""
        cadence = self.plan.cadence
        with self._resources, self._signals:
            self._timers.take()
            while (stop := self._reason_to_stop()) is None:
                self._train_step()
                self._tell_start()
                if self._checkpoints is not None:
                    self._tell(self._checkpoints.poll())
                if self._due(cadence.log):
                    self._report()
                if self._due(cadence.evaluate):
                    self._evaluate("validation")
                if self._due(cadence.save):
                    self._save()
            return self._leave(stop)

    def _reason_to_stop(self) -> Stop | None:
        with self._timers.measure("agreement"):  # the ranks ask each other: the wait for the last of them, mostly
            return self._rules.stop(self.state, stepped=self.state.iteration > self._first_iteration)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and interval > 0 and self.state.iteration % interval == 0

    def _train_step(self) -> None:
        state, plan = self.state, self.plan
        samples = plan.batch_size.at(state.consumed_samples)
        learning_rate, weight_decay = plan.schedule.at(state)
        with self._timers.measure("data"):
            micro_batches = list(islice(self._training_batches, samples // plan.samples_per_micro_step))
        with self._timers.measure("step"):
            result = self.engine.train_step(micro_batches, learning_rate=learning_rate, weight_decay=weight_decay)
        state.advance(samples=samples, tokens=samples * plan.speed.tokens_per_sample)
        self._interval.add(result, state, samples=samples, learning_rate=learning_rate, weight_decay=weight_decay)

    def _tell_start(self) -> None:
        """Say after the first step what it took to get there."""
        if self.state.iteration == self._first_iteration + 1:
            self._interval.settle(self.state)  # waits for the step
            self._start.passed("first step")
            self._reporter.say(self._start.describe())

    def _report(self) -> None:
        interval, state = self._interval, self.state
        interval.settle(state)
        self.peak_gib = memory_gib(self.engine)
        seconds, timers = self._timers.take()
        timers["overhead"] = interval.overhead(seconds)
        self._reporter.train(
            {
                **state.to_json(),
                **interval.to_json(),
                "elapsed_ms_per_step": 1e3 * seconds / interval.steps,
                **self.plan.speed.measure(interval.samples, seconds),
                "eta_seconds": self._seconds_left(seconds / interval.samples),
                **({} if self._params_norm is None else {"params_norm": self._params_norm()}),
                "memory_gib": self.peak_gib,
                "timers_ms": {name: 1e3 * spent / interval.steps for name, spent in timers.items()},
            }
        )
        self._interval = Interval(self.plan.lowest_loss_scale, self._watch)

    def _seconds_left(self, seconds_per_sample: float) -> float | None:
        total = self.plan.total_samples
        return None if total is None else max(total - self.state.consumed_samples, 0) * seconds_per_sample

    def _evaluate(self, split: str) -> None:
        if split not in self._held_out:
            return
        with self._timers.measure("evaluate", part_of_step=False):
            micro_batches_per_step = self.plan.batch_size.final // self.plan.samples_per_micro_step
            result = evaluate(
                self.engine,
                self._held_out[split](),
                steps=self.plan.evaluation_steps,
                micro_batches_per_step=micro_batches_per_step,
            )
        self._reporter.evaluation({"split": split, **self.state.to_json(), **result.to_json()})
        if split == "validation":
            self._evaluated_at = self.state.iteration

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        self._interval.settle(self.state)
        if self.state.nonfinite_streak:  # its weights may be spoiled, and it would push a good checkpoint out
            self._reporter.say(
                f" not saved: the loss or the gradient of iteration {self.state.iteration} is not finite"
            )
            return
        with self._timers.measure("save", part_of_step=False):
            saved = self._checkpoints.save(self.engine, self.state)
        self._saved_at = self.state.iteration
        self._tell(saved)

    def _tell(self, saved: Sequence[Saved]) -> None:
        for one in saved:
            self._reporter.saved(one)

    def _leave(self, stop: Stop) -> int:
        state = self.state
        if self._interval.steps:
            self._report()
        if stop.finished and self._evaluated_at != state.iteration:
            self._evaluate("validation")
        if stop.finished:
            self._evaluate("test")
        self._reporter.say(
            f" stopping at iteration {state.iteration} ({state.consumed_samples} samples): {stop.reason}"
        )
        if stop.save and self._saved_at != state.iteration:
            self._save()
        if self._checkpoints is not None:
            with self._timers.measure("save", part_of_step=False):
                self._tell(self._checkpoints.finish())
        return stop.exit_code
