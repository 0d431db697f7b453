"""An engine seen from outside: it passes every call on, and whoever watches steps overrides `train_step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from megatron.checkpoint.fragments import Fragment, LogicalTensors
from megatron.engine.interface import Engine, MicroBatch, StepResult


class WatchedEngine:
    """Another engine, call by call."""

    def __init__(self, engine: Engine) -> None:
        self.device = engine.device
        self.module = engine.module
        self._engine = engine

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, weight_decay: float) -> StepResult:
        """See `Engine.train_step`."""
        return self._engine.train_step(micro_batches, learning_rate, weight_decay)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`."""
        return self._engine.evaluate(micro_batches)

    def state_fragments(self) -> Iterator[Fragment]:
        """See `Engine.state_fragments`."""
        return self._engine.state_fragments()

    def state(self) -> dict[str, Any]:
        """See `Engine.state`."""
        return self._engine.state()

    def load(self, tensors: LogicalTensors, state: Mapping[str, Any] | None, *, optimizer: bool = True) -> None:
        """See `Engine.load`."""
        self._engine.load(tensors, state, optimizer=optimizer)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()


class SteadyWeights(WatchedEngine):
    """An engine that lets the products of its model know how long the weights stay.

    Args:
        engine: changes weights at the end of a training step alone.
        weights_stay: gives the context of a step.
    """

    def __init__(self, engine: Engine, weights_stay: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(engine)
        self._weights_stay = weights_stay

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, weight_decay: float) -> StepResult:
        """See `Engine.train_step`."""
        with self._weights_stay():
            return super().train_step(micro_batches, learning_rate, weight_decay)
