"""DeepSpeed's plain engine, ZeRO 0-3, behind the `Engine` interface."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import pydantic
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import Fragment, LogicalTensors
from megatron.config.errors import ConfigError
from megatron.engine.fragments import (
    fragments_of,
    kinds_of,
    read_places,
    refresh_weights,
    step_of,
    stepped_by,
    type_of,
)
from megatron.engine.gradient_sum import sum_in_one_pass
from megatron.engine.interface import Engine, MicroBatch, StepResult
from megatron.engine.launch import quiet_stdout
from megatron.engine.mpu import DeepSpeedGroups
from megatron.engine.stopwatch import Stopwatch
from megatron.engine.without_compiler import import_muon, keep_off_optimizers
from megatron.engine.zero import prepare_zero, restore_globals
from megatron.parallel.collectives import reduce_from_group
from megatron.parallel.groups import ParallelGroups

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes of a dynamic loss scale while a run trains."""


def build_flat_engine(
    model: nn.Module,
    param_groups: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    groups: ParallelGroups,
    device: torch.device,
) -> Engine:
    """Hand a model to DeepSpeed.

    Args:
        model: `model(tokens, labels=, loss_mask=, position_ids=, attention_mask=, document_ids=)` returns the fp32 sum
            of the micro-batch's token losses. Its parameters are initialised; DeepSpeed casts, moves and shards them,
            unless `divide_weights` has.
        param_groups: the optimizer's groups, each with `params` and, unless 1, `lr_mult` and `wd_mult`.
        settings: DeepSpeed's dictionary, from `build_settings`.
        groups: the ranks that share the work.
        device: this rank's device, as `launch.start` returned it.

    Raises:
        ConfigError: DeepSpeed refuses a setting.
    """
    prepare_zero(model, settings["zero_optimization"], groups)
    engine = initialize(model, param_groups, settings, DeepSpeedGroups(groups))
    return FlatEngine(engine, groups, device)


def initialize(
    module: nn.Module, param_groups: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], mpu: Any = None
) -> Any:
    """Call `deepspeed.initialize`; returns its engine.

    Raises:
        ConfigError: DeepSpeed refuses a setting.
    """
    # DeepSpeed's collectives go by names that torch 2.13 renamed, which it would say at each call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import_muon()
    keep_off_optimizers()
    gc.freeze()  # DeepSpeed collects garbage half a dozen times: it need not search through all that was there before
    try:
        with quiet_stdout():
            engine, *_ = deepspeed.initialize(
                model=module,
                model_parameters=[dict(group) for group in param_groups],
                config=copy.deepcopy(dict(settings)),
                mpu=mpu,
                dist_init_required=False,
            )
    except pydantic.ValidationError as error:
        raise ConfigError(
            [f"--deepspeed_config: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        ) from error
    finally:
        gc.unfreeze()
    sum_in_one_pass(engine.optimizer)
    return engine


class FlatEngine:
    """One DeepSpeed engine over all layers.

    A loss reaches DeepSpeed as `sum of token losses x replicas / tokens of the whole step`: it sums over the
    micro-batches and averages over the replicas (data and Ulysses ranks), which leaves the gradient of the mean over
    all tokens. Tensor ranks compute the same loss, each with its part of the weights.
    """

    def __init__(self, engine: DeepSpeedEngine, groups: ParallelGroups, device: torch.device) -> None:
        self.device = device
        self.module: nn.Module = engine.module
        self._engine = engine
        self._replicas = groups.replicas
        self._tensor = groups.tensor
        self._groups = groups
        self._sharded = engine.zero_optimization_stage() > 0
        if self._scaler is not None:
            # At the lowest scale DeepSpeed would end the run; here such a step is one more that is skipped and counted.
            self._scaler.raise_error_at_min_scale = False
        engine.train()

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, weight_decay: float) -> StepResult:
        """See `Engine.train_step`."""
        if not micro_batches:
            raise ValueError("a step needs at least one micro-batch")
        self._write_rates(learning_rate, weight_decay)
        tokens = self._count_tokens(micro_batches).clamp(min=1)
        weight = (self._replicas.size / tokens).float()
        loss_scale = self._loss_scale
        loss_sum = torch.zeros((), device=self.device)
        inner = Stopwatch()
        for index, micro_batch in enumerate(micro_batches):
            batch = micro_batch.to(self.device)
            with inner:
                # Said by hand, since DeepSpeed counts with the batch size it was built with, and that may grow.
                self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                loss = self._forward(batch)
                self._engine.backward(loss * weight, scale_wrt_gas=False)
            loss_sum += loss.detach()
        with inner:
            grad_norm, skipped = self._step() if self._sharded else self._step_unsharded()
        self._sum_over_replicas(loss_sum)
        return StepResult(
            loss=loss_sum / tokens.float(),
            grad_norm=grad_norm,
            skipped=skipped,
            loss_scale=loss_scale,
            inner_seconds=inner.seconds,
        )

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`."""
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        self._engine.eval()
        try:
            with torch.no_grad():
                for micro_batch in micro_batches:
                    loss_sum += self._forward(micro_batch.to(self.device))
        finally:
            self._engine.train()
        self._sum_over_replicas(loss_sum)
        return loss_sum, self._count_tokens(micro_batches)

    def state_fragments(self) -> Iterator[Fragment]:
        """See `Engine.state_fragments`."""
        return fragments_of(self.module, self._engine.optimizer, self._groups)

    def state(self) -> dict[str, Any]:
        """See `Engine.state`."""
        optimizer, scaler = stepped_by(self._engine.optimizer), self._scaler
        dynamic = isinstance(scaler, DynamicLossScaler)
        return {
            "optimizer": {
                "type": type_of(optimizer),
                "step": step_of(optimizer),
                "kinds": list(kinds_of(optimizer)) if any(optimizer.state.values()) else [],
            },
            "loss_scaler": {name: getattr(scaler, name) for name in SCALER_STATE} if dynamic else None,
        }

    def load(self, tensors: LogicalTensors, state: Mapping[str, Any] | None, *, optimizer: bool = True) -> None:
        """See `Engine.load`."""
        problem: Exception | None = None
        try:
            step = _saved_step(state or {}, stepped_by(self._engine.optimizer), tensors) if optimizer else None
            read_places(self.module, self._engine.optimizer, self._groups, tensors, step)
            if optimizer and isinstance(self._scaler, DynamicLossScaler):
                _take_over_state(self._scaler, (state or {}).get("loss_scaler"))
        except Exception as error:  # of whatever kind: the other ranks wait to hear of it
            problem = error
        _raise_together(problem, tensors, self.device)
        with quiet_stdout():
            refresh_weights(self._engine.optimizer)

    def close(self) -> None:
        """See `Engine.close`."""
        with quiet_stdout():
            self._engine.destroy()
        restore_globals()

    @property
    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    @property
    def _scaler(self) -> Any:
        return getattr(self._engine.optimizer, "loss_scaler", None) if self._engine.fp16_enabled() else None

    @property
    def _loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0

    def _write_rates(self, learning_rate: float, weight_decay: float) -> None:
        for group in self._param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)

    def _forward(self, batch: MicroBatch) -> Tensor:
        loss: Tensor = self._engine(
            batch.tokens,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            document_ids=batch.document_ids,
        )
        return loss

    def _count_tokens(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Unmasked tokens of these micro-batches over all ranks, 0-d fp64."""
        total = torch.zeros((), dtype=torch.float64)
        masks = [micro_batch.loss_mask for micro_batch in micro_batches]
        if all(mask is None for mask in masks):  # then every rank holds as many, and none need be asked
            total += self._replicas.size * sum(micro_batch.labels.numel() for micro_batch in micro_batches)
            return total.to(self.device, non_blocking=True)  # else the host waits for the step before to end
        for micro_batch, mask in zip(micro_batches, masks, strict=True):
            total = total + (micro_batch.labels.numel() if mask is None else mask.sum(dtype=torch.float64))
        total = total.to(self.device, non_blocking=True)
        self._sum_over_replicas(total)
        return total

    def _sum_over_replicas(self, value: Tensor) -> None:
        if self._replicas.size > 1:
            dist.all_reduce(value, group=self._replicas.handle)

    def _step(self) -> tuple[Tensor, bool]:
        """Let ZeRO's optimizer clip and step; it skips the step itself when a gradient is not finite."""
        scaler = self._scaler
        if isinstance(scaler, DynamicLossScaler):
            self._step_before_growth(scaler)
        else:
            self._advance()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        skipped = not self._engine.was_step_applied()
        optimizer = self._engine.optimizer
        if skipped and isinstance(optimizer, DeepSpeedZeroOptimizer):
            # With the optimizer on the host DeepSpeed would add the next steps' gradients to those of the skipped one.
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        return norm, skipped

    def _step_before_growth(self, scaler: DynamicLossScaler) -> None:
        """Step, and only then let the loss scale grow.

        DeepSpeed grows it first and divides the gradients by the new value, so that each growth halves one update.
        """
        window, scaler.scale_window = scaler.scale_window, sys.maxsize
        self._advance()
        scaler.scale_window = window
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 2  # cur_iter counts this step already
        if good_steps > 0 and good_steps % window == 0:
            scaler.cur_scale *= scaler.scale_factor
            scaler.cur_hysteresis = scaler.delayed_shift

    def _advance(self) -> None:
        """Let DeepSpeed take the step."""
        self._engine.step()

    def _step_unsharded(self) -> tuple[Tensor, bool]:
        """Step without ZeRO, where DeepSpeed has the bare optimizer: it neither tells the norm nor skips a step."""
        norm = self._unsharded_norm()
        finite = bool(torch.isfinite(norm))
        if finite:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm, not finite

    def _unsharded_norm(self) -> Tensor:
        """Norm over the tensor ranks: a divided parameter counts on each of them, one that all hold on the first."""
        counted = [
            parameter.grad
            for parameter in self.module.parameters()
            if parameter.grad is not None and (self._tensor.rank == 0 or is_model_parallel_parameter(parameter))
        ]
        square = torch.nn.utils.get_total_norm(counted).to(self.device, torch.float64).square()
        return reduce_from_group(square, self._tensor).sqrt().float()


def _saved_step(state: Mapping[str, Any], optimizer: torch.optim.Optimizer, tensors: LogicalTensors) -> int | None:
    """Return after how many updates the optimizer's states were saved; None where it had none yet.

    Raises:
        CheckpointError: the checkpoint is without states, or of another optimizer.
    """
    saved = state.get("optimizer")
    if saved is None:
        raise CheckpointError(
            f"{tensors.folder} was saved without the optimizer's state: add --no-load-optim to go on with its weights"
        )
    if saved["type"] != type_of(optimizer):
        raise CheckpointError(
            f"{tensors.folder} was saved with --optimizer {saved['type']}, and this run has {type_of(optimizer)}, "
            "whose state is another: start with the same, or add --no-load-optim"
        )
    return int(saved["step"]) if saved.get("kinds") != [] else None


def _raise_together(problem: Exception | None, tensors: LogicalTensors, device: torch.device) -> None:
    """Raise on every rank when one of them has a problem, so that none goes on alone.

    Raises:
        CheckpointError: says what this rank found, or the first that found something.
    """
    failed = torch.tensor(float(problem is not None), device=device)
    dist.all_reduce(failed)
    if not failed.item():
        return
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if problem is None else str(problem))
    if isinstance(problem, CheckpointError):
        raise problem
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    raise CheckpointError(f"rank {rank} cannot load {tensors.folder}: {message}") from problem


def _take_over_state(scaler: DynamicLossScaler, saved: Mapping[str, float] | None) -> None:
    """Continue a dynamic loss scale where the checkpoint left it; its rules, and a constant scale, are the flags'."""
    for name, value in (saved or {}).items():
        if name in SCALER_STATE:
            setattr(scaler, name, value)
