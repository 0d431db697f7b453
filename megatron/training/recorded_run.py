"""What one rank records of a run: its losses, gradient norms, and weights before the first and after the last step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron.config.sections import RunConfig
from megatron.engine.interface import Engine, MicroBatch, StepResult
from megatron.engine.launchers import RankEnvironment
from megatron.parallel.groups import ParallelGroups
from megatron.parallel.mesh import Coordinates
from megatron.parallel.sharding import Sharding, sharding_of
from megatron.training.build import build_trainer
from megatron.training.metrics import memory_gib
from megatron.training.watched_engine import WatchedEngine


@dataclass(frozen=True)
class Held:
    """A rank's shard of a logical tensor: fp32, on the host."""

    tensor: Tensor
    sharding: Sharding


@dataclass
class Record:
    """What a run came to on one rank.

    Attributes:
        coordinates: of the rank in the mesh.
        initial: the weights before the first step, by name.
        final: the weights after the last one.
        learning_rate: of the last step.
        peak_gib: memory that was allocated on the device at most; None on a CPU.
    """

    coordinates: Coordinates
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    initial: dict[str, Held] = field(default_factory=dict)
    final: dict[str, Held] = field(default_factory=dict)
    learning_rate: float = 0.0
    peak_gib: float | None = None

    def gradients(self) -> dict[str, Held]:
        """Of a run of one step of plain SGD without clipping and decay: what it stepped by."""
        return {name: Held(-step.tensor / self.learning_rate, step.sharding) for name, step in self.travels().items()}

    def travels(self) -> dict[str, Held]:
        """How far each weight went."""
        return {
            name: Held(self.final[name].tensor - before.tensor, before.sharding)
            for name, before in self.initial.items()
        }


def record_run(
    config: RunConfig, environment: RankEnvironment, watch: Callable[[nn.Module], None] | None = None
) -> Record:
    """Train as `pretrain_gpt.py` does; every rank calls it, and may call it several times.

    Args:
        config: of a run that trains for `train_iters`.
        environment: this process's rank.
        watch: shown the engine's module before the first step.

    Raises:
        UserError: the run cannot be built.
    """
    if torch.cuda.is_initialized():  # by an earlier run of this process
        torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(config, environment)
    trainer.engine = recorded = RecordedEngine(trainer.engine, trainer.plan.total_iterations or 0)
    if watch is not None:
        watch(recorded.module)
    trainer.fit()
    return recorded.record


class RecordedEngine(WatchedEngine):
    """An engine that notes what its steps come to; the last one is followed by a look at the weights.

    Attributes:
        record: what was noted so far.
    """

    def __init__(self, engine: Engine, num_steps: int) -> None:
        super().__init__(engine)
        self._num_steps = num_steps
        groups: ParallelGroups = engine.module.groups  # type: ignore[assignment]
        places = Coordinates(groups.pipeline.rank, groups.data.rank, groups.ulysses.rank, groups.tensor.rank)
        self.record = Record(coordinates=places, initial=held_weights(engine.module))

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, weight_decay: float) -> StepResult:
        """See `Engine.train_step`."""
        result = super().train_step(micro_batches, learning_rate, weight_decay)
        record = self.record
        record.losses.append(float(result.loss))
        record.grad_norms.append(float(result.grad_norm))
        record.learning_rate = learning_rate
        if len(record.losses) == self._num_steps:
            record.peak_gib = memory_gib(self) if self.device.type == "cuda" else None
            record.final = held_weights(self.module)
        return result


def held_weights(module: nn.Module) -> dict[str, Held]:
    """Copy what this rank holds of every weight; all ranks that share the weights call it together."""
    from megatron.engine.full_weights import full_weights  # DeepSpeed prints when it is imported

    shardings = {name: sharding_of(parameter) for name, parameter in module.named_parameters()}
    return {name: Held(weight, shardings[name]) for name, weight in full_weights(module).items()}
