"""DeepSpeed's configuration dictionary: this module is its one author.

DeepSpeed ignores top-level keys that it does not know and fills in defaults that change gradients, so every key that
matters is written here, and what the user's own file may say is checked against what the flags say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.config.errors import ConfigError
from megatron.engine.user_settings import merge_user_settings

if TYPE_CHECKING:
    from megatron.config.sections import RunConfig


SECONDARY_PARTITION = "zero_hpz_partition_size"
"""Of ZeRO++: backward gathers weights within groups of so many ranks, each of which keeps a second share."""

BLOCK = "megatron.model.block.Block"
"""What ZeRO-3 gathers at a time."""

QUANTIZED_WEIGHTS = "zero_quantized_weights"
"""Of ZeRO++: weights are gathered as 8-bit integers, each rank's share with scales of its own."""


def build_settings(
    config: RunConfig, user: Mapping[str, Any] | None = None, *, data_parallel_size: int, device_type: str
) -> dict[str, Any]:
    """Make DeepSpeed's dictionary from the flags and merge the user's own into it.

    Args:
        config: the run's sections.
        user: content of the file of --deepspeed_config; "auto" stands for what the flags say.
        data_parallel_size: number of ranks that share the batch.
        device_type: "cuda" or "cpu".

    Raises:
        ConfigError: the file has an unknown or refused key or contradicts a flag, or DeepSpeed cannot do what the
            flags say; all broken rules at once.
    """
    problems = list(_find_unsupported(config, data_parallel_size))
    if problems:
        raise ConfigError(problems)
    settings = _from_flags(config, data_parallel_size, device_type)
    if user:
        problems = list(merge_user_settings(settings, user))
        if config.parallel.pipeline_model_parallel_size > 1:
            problems += _find_pipeline_conflicts(settings)
        replicas = data_parallel_size * config.parallel.ds_sequence_parallel_size
        zero = settings["zero_optimization"]
        problems += _find_zero_conflicts(zero, config.training.precision, replicas, device_type)
        if problems:
            raise ConfigError(problems)
    # To DeepSpeed the Ulysses ranks are data-parallel ones (see `mpu.DeepSpeedGroups`), each with samples of its own.
    settings["train_batch_size"] *= config.parallel.ds_sequence_parallel_size
    return settings


def _find_unsupported(config: RunConfig, data_parallel_size: int) -> Iterator[str]:
    training, engine = config.training, config.engine
    if engine.zero_stage == 0 and training.precision != "fp32":
        # Its half-precision wrappers take one optimizer step at start, so that Adam's step count is off by one.
        yield (
            f"--zero-stage 0 with --precision {training.precision}: DeepSpeed's first update is wrong in that mix; "
            "use --zero-stage 1, or --precision fp32"
        )
    if engine.zero_stage == 0 and engine.cpu_optimizer:
        yield "--cpu-optimizer needs ZeRO: use --zero-stage 1, 2 or 3"
    if engine.zero_stage != 3 and engine.remote_device != "none":
        yield f"--remote-device {engine.remote_device} needs divided weights: use --zero-stage 3"
    samples = training.micro_batch_size * data_parallel_size
    if training.global_batch_size % samples:
        yield (
            f"--global-batch-size {training.global_batch_size} is not a multiple of --micro-batch-size "
            f"{training.micro_batch_size} x data-parallel size {data_parallel_size} = {samples}"
        )
    if training.precision == "fp16" and not math.log2(training.initial_loss_scale).is_integer():
        yield f"--initial-loss-scale {training.initial_loss_scale} must be a power of two"
    if training.precision == "fp16" and not float(training.min_loss_scale).is_integer():
        yield f"--min-loss-scale {training.min_loss_scale} must be a whole number"


def _find_pipeline_conflicts(settings: Mapping[str, Any]) -> Iterator[str]:
    """Name what of the user's own settings DeepSpeed's pipelined engine cannot do."""
    # Its timers of the backward pass are started twice on every stage but the last, which raises.
    for name, enabled in (
        ("wall_clock_breakdown", settings["wall_clock_breakdown"]),
        ("flops_profiler.enabled", (settings.get("flops_profiler") or {}).get("enabled")),
    ):
        if enabled:
            yield (
                f"--deepspeed_config: '{name}' does not work with --pipeline-model-parallel-size above 1, where "
                "DeepSpeed's timers fail; remove it"
            )


def _find_zero_conflicts(zero: Mapping[str, Any], precision: str, replicas: int, device_type: str) -> Iterator[str]:
    """Name what of the user's own settings of ZeRO would be ignored, or fail, in this layout.

    Args:
        zero: the settings "zero_optimization".
        precision: that of the weights.
        replicas: number of ranks that hold the same weights, or shares of them.
        device_type: "cuda" or "cpu".
    """
    secondary, quantized = zero.get(SECONDARY_PARTITION, 1), zero.get(QUANTIZED_WEIGHTS, False)
    for name, enabled in ((SECONDARY_PARTITION, secondary > 1), (QUANTIZED_WEIGHTS, quantized)):
        if enabled and zero["stage"] != 3:
            yield (
                f"--deepspeed_config: 'zero_optimization.{name}' is about weights that are gathered for use, which "
                f"--zero-stage {zero['stage']} does not divide; use --zero-stage 3, or remove it"
            )
    if replicas % max(secondary, 1):
        yield (
            f"--deepspeed_config: 'zero_optimization.{SECONDARY_PARTITION}' is {secondary}, which does not divide the "
            f"{replicas} ranks (data-parallel x Ulysses) that share the weights; use a divisor"
        )
    if quantized and precision == "fp32":
        yield (
            f"--deepspeed_config: 'zero_optimization.{QUANTIZED_WEIGHTS}' rounds weights to 8 bits on their way, which "
            "makes no sense of --precision fp32; use bf16 or fp16, or remove it"
        )
    if quantized and device_type != "cuda":
        yield (
            f"--deepspeed_config: 'zero_optimization.{QUANTIZED_WEIGHTS}' needs CUDA GPUs, for which alone DeepSpeed "
            "has kernels; remove it"
        )


def _from_flags(config: RunConfig, data_parallel_size: int, device_type: str) -> dict[str, Any]:
    training, precision = config.training, config.training.precision
    gradient_dtype = "fp32" if training.accumulate_allreduce_grads_in_fp32 else precision
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * data_parallel_size),
        "managed_gradient_accumulation": True,
        "gradient_clipping": float(config.optimizer.clip_grad),  # absent, DeepSpeed clips at 1.0
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": gradient_dtype,  # absent, fp32 sums would travel in bf16
        "data_types": {"grad_accum_dtype": gradient_dtype},
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": False, "check_grad_overflow": True},
        "fp16": _fp16(config),
        "zero_optimization": _zero(config, device_type),
        "zero_allow_untested_optimizer": config.optimizer.optimizer == "sgd",
        "zero_force_ds_cpu_optimizer": False,  # torch's optimizer may work on the host: no C++ build
        "optimizer": _optimizer(config),
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "checkpoint": {"load_universal": False, "tag_validation": "Fail"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
    }


def _fp16(config: RunConfig) -> dict[str, Any]:
    training = config.training
    return {
        "enabled": training.precision == "fp16",
        "auto_cast": False,
        "loss_scale": training.loss_scale or 0,  # 0: dynamic
        "initial_scale_power": round(math.log2(training.initial_loss_scale)),
        "loss_scale_window": training.loss_scale_window,
        "hysteresis": training.hysteresis,
        "consecutive_hysteresis": False,
        "min_loss_scale": round(training.min_loss_scale),
    }


def _zero(config: RunConfig, device_type: str) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_scatter": True,
        "contiguous_gradients": True,
        "overlap_comm": device_type == "cuda" and engine.zero_stage >= 2,  # stage 1 communicates once a step
        "reduce_bucket_size": engine.zero_reduce_bucket_size,
        "allgather_partitions": True,
        "allgather_bucket_size": engine.zero_allgather_bucket_size,
        "round_robin_gradients": False,
        "compute_grad_norm": True,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        # Its product adds the bias in place, so that recompute could keep none of its results.
        "memory_efficient_linear": config.kernels.recompute_granularity != "products",
    }
    if engine.zero_stage == 3:
        # A block gathers its weights together, by hooks around it in the place of hooks around each of its modules, of
        # which there are five times as many.
        zero["leaf_module"] = {"classes": [BLOCK], "names": [], "name_suffixes": []}
    if engine.cpu_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
    if engine.remote_device != "none":
        zero["offload_param"] = {"device": engine.remote_device, "pin_memory": device_type == "cuda"}
    return zero


def _optimizer(config: RunConfig) -> dict[str, Any]:
    """Choose torch's optimizers; their learning rate and weight decay are written anew for each step."""
    optimizer = config.optimizer
    shared = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if optimizer.optimizer == "sgd":
        return {"type": "SGD", "params": {**shared, "momentum": optimizer.sgd_momentum}}
    betas = [optimizer.adam_beta1, optimizer.adam_beta2]
    # torch's own fused AdamW: DeepSpeed's would be compiled at the first start.
    params: dict[str, Any] = {**shared, "betas": betas, "eps": optimizer.adam_eps, "adam_w_mode": True}
    return {"type": "AdamW", "params": {**params, "torch_adam": True, "fused": True}}
