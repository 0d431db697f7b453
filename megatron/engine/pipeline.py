"""DeepSpeed's pipelined engine (1F1B, ZeRO-1) behind the `Engine` interface, over the stages of the flat model.

Legend: s sequence, b micro-batch, h hidden.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron.engine.flat import FlatEngine, initialize
from megatron.engine.interface import Engine, MicroBatch, StepResult
from megatron.engine.launch import quiet_stdout
from megatron.engine.stopwatch import Stopwatch
from megatron.model.gpt import GPT, TIED_EMBEDDING
from megatron.parallel.groups import ParallelGroups
from megatron.parallel.partition import stage_parts

EMBEDDING_KEY = TIED_EMBEDDING.rpartition(".")[2]


def build_stage(model: GPT, counts: Sequence[int], groups: ParallelGroups, device: torch.device) -> PipelineStage:
    """Make this rank's part of a model, with empty weights; every rank calls it.

    Args:
        model: made on the "meta" device, so that it takes no memory; its own layers become real.
        counts: blocks of each pipeline stage, at least one each.
        groups: the ranks that share the work.
        device: where the weights go: this rank's device, as `launch.start` returned it.
    """
    with quiet_stdout():
        deepspeed.init_distributed(dist_init_required=False)  # its own handle of the running process group
        return PipelineStage(model, stage_parts(counts), groups, device)


def build_pipeline_engine(
    stage: PipelineStage,
    param_groups: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    groups: ParallelGroups,
    device: torch.device,
) -> Engine:
    """Hand a pipeline to DeepSpeed; every rank its own stage.

    Args:
        stage: from `build_stage`, its parameters initialised.
        param_groups: the optimizer's groups, as for the flat engine.
        settings: DeepSpeed's dictionary, from `build_settings`, with ZeRO-1.
        groups: the ranks that share the work.
        device: this rank's device.

    Raises:
        ConfigError: DeepSpeed refuses a setting.
    """
    engine = initialize(stage, param_groups, settings)
    return PipelinedEngine(engine, stage, groups, device)


class PipelineStage(PipelineModule):
    """The layers of one rank, under the parameter names that the whole model has.

    One tensor crosses a boundary, [s, b, h] in the dtype of the residual stream. What else a layer reads of a
    micro-batch (positions, document mask, labels) each rank takes from its own copy of it: the ranks of a pipeline
    read the same samples, and DeepSpeed runs the forward passes in the order of the micro-batches on every rank.

    Attributes:
        counts: blocks of each stage of the pipeline.
        groups: the ranks that share the model.
        loss_weight: factor on the sum of a micro-batch's token losses.
    """

    def __init__(self, model: GPT, parts: Sequence[range], groups: ParallelGroups, device: torch.device) -> None:
        self.counts = [len(model.blocks_in(part)) for part in parts]
        self.loss_weight: Tensor | float = 1.0
        self._model = (model,)  # in a tuple: a submodule would give every weight a second name
        self.groups = groups
        self._parts = parts
        self._part = parts[groups.pipeline.rank]
        self._device = device
        self._micro_batches: deque[MicroBatch] = deque()
        layers: list[Any] = model.stages()
        tied = not model.config.untie_embeddings_and_output_weights
        for index in self._part:
            _materialize(layers[index], device)
        if tied:
            if self.is_last:
                _materialize(layers[0], device)
            layers[0], layers[-1] = _SharedLayer(layers[0]), _SharedLayer(layers[0], forward_fn=layers[-1])
        topology = PipeModelDataParallelTopology(
            num_pp=groups.pipeline.size, num_mp=groups.tensor.size, num_dp=groups.replicas.size
        )
        super().__init__(layers, topology=topology)

    @property
    def is_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self._part == self._parts[-1]

    def deliver(self, micro_batches: Sequence[MicroBatch], loss_weight: Tensor | float) -> Iterator[tuple[Any, Any]]:
        """Prepare for the forward passes of these micro-batches; returns the data iterator that DeepSpeed asks for."""
        self._micro_batches = deque(micro_batches)
        self.loss_weight = loss_weight
        return ((micro_batch.tokens, ()) for micro_batch in micro_batches)

    def forward(self, x: Tensor) -> Tensor:
        """Take the next micro-batch through this rank's layers.

        Args:
            x: tokens [b, s] on the first stage, else [s, b, h] of the stage before.

        Returns:
            [s, b, h]; on the last stage the weighted sum of the token losses, an fp32 scalar. Were that left to
            DeepSpeed's `loss_fn`, its buffers would keep the logits of the micro-batch before alive.
        """
        (model,) = self._model
        micro_batch = self._micro_batches.popleft()
        context = model.context(
            micro_batch.tokens,
            self._here(micro_batch.position_ids),
            self._here(micro_batch.attention_mask),
            document_ids=self._here(micro_batch.document_ids),
        )
        if not self.is_last:
            return model.run_part(x, context, self._part).contiguous()  # what is sent must be
        labels = micro_batch.labels.to(self._device, non_blocking=True)
        loss = model.run_to_loss(x, context, self._part, labels, self._here(micro_batch.loss_mask))
        return loss * self.loss_weight

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self._device, non_blocking=True)

    @torch.no_grad()  # a collective on a parameter would leave torch a hook to warn of
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()

    def _partition_layers(self, method: str = "") -> None:
        """Say which layers are whose: called by DeepSpeed's constructor, whose own methods know no block counts."""
        self.parts = [0, *(part.stop for part in self._parts)]
        self._set_bounds(start=self._part.start, stop=self._part.stop)


class _SharedLayer(TiedLayerSpec):
    """A layer that the first and the last stage hold; DeepSpeed sums its gradients over the two."""

    def __init__(self, layer: nn.Module, forward_fn: Any = None) -> None:
        super().__init__(EMBEDDING_KEY, type(layer), forward_fn=forward_fn)
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        """Return the layer, which exists already."""
        return self._layer


class PipelinedEngine(FlatEngine):
    """One rank of a pipeline. Between steps it is a flat engine over its own stage.

    A loss reaches DeepSpeed as `sum of token losses x micro-batches x replicas / tokens of the whole step`:
    it averages over the micro-batches and the replicas (data and Ulysses ranks), which leaves the mean over all tokens.
    """

    def __init__(
        self,
        engine: DeepSpeedPipelineEngine,
        stage: PipelineStage,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        super().__init__(engine, groups, device)
        self._stage = stage
        self._pipeline = groups.pipeline
        self._shape: torch.Size | None = None
        self._batches: Iterator[Any] = iter(())
        self._loss = torch.zeros((), device=device)
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.ReduceTiedGrads: _reduce_tied_gradients}

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, weight_decay: float) -> StepResult:
        """See `Engine.train_step`. All micro-batches of a step have one shape.

        Raises:
            ValueError: there is no micro-batch, or their shapes differ.
        """
        if not micro_batches:
            raise ValueError("a step needs at least one micro-batch")
        self._write_rates(learning_rate, weight_decay)
        tokens = self._count_tokens(micro_batches).clamp(min=1)
        count, engine = len(micro_batches), self._engine
        self._deliver(micro_batches, (count * self._replicas.size / tokens).float())
        engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        loss_scale = self._loss_scale
        with Stopwatch() as inner:
            grad_norm, skipped = self._step()
        return StepResult(
            loss=self._loss,
            grad_norm=grad_norm,
            skipped=skipped,
            loss_scale=loss_scale,
            inner_seconds=inner.seconds,
        )

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`. All micro-batches of a call have one shape.

        Raises:
            ValueError: their shapes differ.
        """
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        if micro_batches:
            for loss in self._forward_all(micro_batches):
                loss_sum += loss
        self._sum_over_replicas(loss_sum)
        dist.all_reduce(loss_sum, group=self._pipeline.handle)  # zero but on the last stage
        return loss_sum, self._count_tokens(micro_batches)

    def _forward_all(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Take micro-batches through the pipeline without gradients; returns their losses on the last stage."""
        self._deliver(micro_batches, 1.0)
        engine = self._engine
        try:
            losses: list[Tensor] | None = engine.eval_batch(
                self._batches, reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
            )
        finally:
            engine.train()
            for slots in engine.pipe_buffers.values():  # DeepSpeed would keep the last activations
                slots[:] = itertools.repeat(None, len(slots))
        return losses or []

    def _deliver(self, micro_batches: Sequence[MicroBatch], loss_weight: Tensor | float) -> None:
        """Hand the stage its micro-batches, and have buffers made anew where their shape has changed."""
        shapes = {micro_batch.tokens.shape for micro_batch in micro_batches}
        if len(shapes) > 1:
            raise ValueError(f"micro-batches of one step have the shapes {sorted(map(tuple, shapes))}: they must agree")
        (shape,) = shapes
        if shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = shape
        self._batches = self._stage.deliver(micro_batches, loss_weight)

    def _advance(self) -> None:
        """Let DeepSpeed take all micro-batches through the pipeline, and the optimizer step at the end."""
        self._loss = self._engine.train_batch(self._batches)
        self._engine.timers(TRAIN_BATCH_TIMER).reset()  # it would keep the time of every step


def _materialize(layer: nn.Module, device: torch.device) -> None:
    """Give a layer that was made on the "meta" device empty parameters with the marks of the old ones."""
    for owner in layer.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            real.__dict__.update(parameter.__dict__)
            owner.register_parameter(name, real)


def _reduce_tied_gradients(engine: DeepSpeedPipelineEngine) -> None:
    """Sum the tied weight's gradients over its two stages, wherever the optimizer accumulates them.

    DeepSpeed's own instruction looks at `.grad` alone and passes over gradients of half precision that are summed in
    fp32, so that the two copies of the weight drift apart.
    """
    optimizer = engine.optimizer
    for weight, group in engine.module.get_tied_weights_and_groups():
        bf16 = isinstance(optimizer, BF16_Optimizer)
        dist.all_reduce(weight._hp_grad if bf16 else optimizer.get_param_gradient_attribute(weight), group=group)
