"""An engine seen from outside: it passes every call on, and whoever watches steps overrides `train_step`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
