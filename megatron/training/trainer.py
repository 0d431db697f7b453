"""The training loop. The order on the page is the order in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.engine.interface import Engine, MicroBatch
from megatron.parallel.random import RandomStreams
from megatron.training.batch_size import BatchSize
from megatron.training.checkpoint import save_checkpoint
from megatron.training.control import Control
from megatron.training.evaluate import evaluate
from megatron.training.metrics import Interval, SpeedModel, memory_gib
from megatron.training.report import Reporter
from megatron.training.schedule import LearningRate, WeightDecay
from megatron.training.state import TrainState
from megatron.training.stop import EXIT_DONE, SignalFlag, Stop, StopRules
from megatron.training.timers import Timers

Batches = Iterator[MicroBatch]


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often things happen, in steps, and how large they are; None and 0 are never."""

    log: int
    evaluate: int
    evaluation_steps: int
    save: int | None
    keep_last: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to do: pure functions of the counters, and constants.

    Attributes:
        samples_per_micro_step: samples that all ranks together take through the model at once.
        total_samples: where the training ends, or None when only a request ends it.
    """

    batch_size: BatchSize
    learning_rate: LearningRate
    weight_decay: WeightDecay
    speed: SpeedModel
    samples_per_micro_step: int
    total_samples: int | None
    cadence: Cadence


class Trainer:
    """A run: trains until there is a reason to stop.

    Args:
        plan: what to do.
        state: where to start; changes with every step.
        engine: trains.
        training_batches: this rank's micro-batches from `state` on, without end.
        held_out: for "validation" and "test", how to open this rank's micro-batches from the first one.
        rules: when to stop.
        signals: what asks the process to stop.
        reporter: whom to tell.
        control: the ranks.
        streams: random streams, for the checkpoints.
        save: folder of the checkpoints, or None.
        saved: what a checkpoint keeps besides the counters: the run's config, and its layout.
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
        control: Control,
        streams: RandomStreams,
        timers: Timers,
        interval: Interval,
        save: Path | None,
        saved: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.plan = plan
        self.state = state
        self.engine = engine
        self._training_batches = training_batches
        self._held_out = held_out
        self._rules = rules
        self._signals = signals
        self._reporter = reporter
        self._control = control
        self._streams = streams
        self._timers = timers
        self._interval = interval
        self._save = save
        self._saved = saved
        self._first_iteration = self._saved_at = self._evaluated_at = state.iteration

    def fit(self) -> int:
        """Train, and return the exit code of the process."""
        cadence = self.plan.cadence
        with closing(self._reporter), closing(self.engine), self._signals:
            self._timers.take()
            while (stop := self._reason_to_stop()) is None:
                self._train_step()
                if self._due(cadence.log):
                    self._report()
                if self._due(cadence.evaluate):
                    self._evaluate("validation")
                if self._due(cadence.save):
                    self._checkpoint()
            return self._leave(stop)

    def evaluate_only(self) -> int:
        """Evaluate on the validation and the test set, and return the exit code of the process."""
        with closing(self._reporter), closing(self.engine):
            for split in self._held_out:
                self._evaluate(split)
            return EXIT_DONE

    def _reason_to_stop(self) -> Stop | None:
        return self._rules.stop(self.state, stepped=self.state.iteration > self._first_iteration)

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.state.iteration % interval == 0

    def _train_step(self) -> None:
        state, plan = self.state, self.plan
        samples = plan.batch_size.at(state.consumed_samples)
        with self._timers.measure("data"):
            micro_batches = list(islice(self._training_batches, samples // plan.samples_per_micro_step))
        with self._timers.measure("step"):
            result = self.engine.train_step(
                micro_batches,
                learning_rate=plan.learning_rate.at(state.progress(plan.learning_rate.unit)),
                weight_decay=plan.weight_decay.at(state.progress(plan.weight_decay.unit)),
            )
        state.advance(samples=samples, tokens=samples * plan.speed.tokens_per_sample)
        self._interval.add(result, samples, state)
