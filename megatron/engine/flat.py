"""DeepSpeed's plain engine, ZeRO 0-3, behind the `Engine` interface."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from megatron.config.errors import ConfigError
from megatron.engine.checkpoint_files import CheckpointFiles, read_file
from megatron.engine.gradient_sum import sum_in_one_pass
from megatron.engine.interface import Engine, MicroBatch, StepResult
from megatron.engine.launch import quiet_stdout
from megatron.engine.mpu import DeepSpeedGroups
from megatron.engine.zero import prepare_zero, restore_globals
from megatron.parallel.collectives import reduce_from_group
from megatron.parallel.groups import ParallelGroups


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
        self._sharded = engine.zero_optimization_stage() > 0
        self._hyperparameters = [
            {key: value for key, value in group.items() if key != "params"} for group in self._param_groups
        ]
        engine.checkpoint_engine = CheckpointFiles()
        engine._copy_recovery_script = lambda save_path: None  # it copies scripts beside the checkpoint
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
        for index, micro_batch in enumerate(micro_batches):
            # Said by hand, since DeepSpeed counts with the batch size it was built with, and that may grow.
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = self._forward(micro_batch)
            self._engine.backward(loss * weight, scale_wrt_gas=False)
            loss_sum += loss.detach()
        grad_norm, skipped = self._step() if self._sharded else self._step_unsharded()
        self._sum_over_replicas(loss_sum)
        return StepResult(loss=loss_sum / tokens.float(), grad_norm=grad_norm, skipped=skipped, loss_scale=loss_scale)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`."""
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        self._engine.eval()
        try:
            with torch.no_grad():
                for micro_batch in micro_batches:
                    loss_sum += self._forward(micro_batch)
        finally:
            self._engine.train()
        self._sum_over_replicas(loss_sum)
        return loss_sum, self._count_tokens(micro_batches)

    def save(self, directory: Path) -> None:
        """See `Engine.save`."""
        with quiet_stdout():
            # DeepSpeed would let `latest` point here before the other ranks have written their files.
            self._engine.save_checkpoint(str(directory.parent), tag=directory.name, save_latest=False)

    def load(self, directory: Path) -> None:
        """See `Engine.load`."""
        self._require_files(directory)
        self._require_same_layout(directory)
        clip_grad = getattr(self._engine.optimizer, "clip_grad", None)
        scaler = self._scaler
        with quiet_stdout():
            self._engine.load_checkpoint(str(directory.parent), tag=directory.name)
        # A checkpoint continues the state; what the flags say holds as of this run.
        for group, values in zip(self._param_groups, self._hyperparameters, strict=True):
            group.update(values)
        if clip_grad is not None:
            self._engine.optimizer.clip_grad = clip_grad
        if scaler is not None:
            _take_over_state(scaler, self._engine.optimizer.loss_scaler)
            self._engine.optimizer.loss_scaler = scaler

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

    def _forward(self, micro_batch: MicroBatch) -> Tensor:
        batch = micro_batch.to(self.device)
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
            return total.to(self.device)
        for micro_batch, mask in zip(micro_batches, masks, strict=True):
            total = total + (micro_batch.labels.numel() if mask is None else mask.sum(dtype=torch.float64))
        total = total.to(self.device)
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

    def _model_file(self, directory: Path) -> Path:
        return Path(self._engine._get_ckpt_name(str(directory.parent), directory.name))

    def _files(self, directory: Path) -> list[Path]:
        """List what this rank reads of a checkpoint."""
        files = [self._model_file(directory)]
        if self._sharded:
            files.append(Path(self._engine._get_zero_ckpt_name(str(directory.parent), directory.name)))
        return files

    def _require_files(self, directory: Path) -> None:
        """Raise on all ranks together when one of them lacks a file: DeepSpeed would let the others go on alone."""
        missing = [file for file in self._files(directory) if not file.is_file()]
        lacking = torch.tensor(float(bool(missing)), device=self.device)
        dist.all_reduce(lacking)
        if lacking.item():
            what = f"{missing[0]} is missing" if missing else f"{lacking.item():.0f} ranks lack their files"
            raise CheckpointError(
                f"checkpoint {directory}: {what}; it is incomplete, or was saved with another number of ranks, "
                "--zero-stage or --precision"
            )

    def _require_same_layout(self, directory: Path) -> None:
        """Raise when the optimizer's state in the files is cut or kept in another way than this engine's."""
        content = read_file(self._model_file(directory), mmap=True)
        then = _describe_layout(content["ds_config"], content["dp_world_size"], content["mp_world_size"])
        now = _describe_layout(self._engine.config, self._replicas.size, self._engine.mp_world_size)
        changes = [f"{name} {then[name]}, not {now[name]}" for name in now if then[name] != now[name]]
        if changes:
            raise CheckpointError(f"checkpoint {directory} was saved with {', '.join(changes)}: resume with the same")


def _describe_layout(settings: Mapping[str, Any], replicas: int, model_ranks: int) -> dict[str, Any]:
    """Name what must not change between saving and loading an engine's state."""
    zero = settings["zero_optimization"]
    partition = settings["pipeline"].get("partition")
    num_stages = len(partition.split(",")) if partition else 1
    return {
        "data-parallel size": replicas,
        "--tensor-model-parallel-size": model_ranks // num_stages,
        "--zero-stage": zero["stage"],
        "--precision": next((name for name in ("bf16", "fp16") if settings[name]["enabled"]), "fp32"),
        "gradients summed in": settings["data_types"]["grad_accum_dtype"],
        "--cpu-optimizer": (zero.get("offload_optimizer") or {}).get("device") == "cpu",
        "--optimizer": settings["optimizer"]["type"],
        "--pipeline-partition": partition,
    }


def _take_over_state(scaler: Any, loaded: Any) -> None:
    """Continue a dynamic loss scale where the checkpoint left it; its rules, and a constant scale, are the flags'."""
    if isinstance(scaler, DynamicLossScaler) and isinstance(loaded, DynamicLossScaler):
        for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
            setattr(scaler, name, getattr(loaded, name))
