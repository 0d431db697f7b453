"""DeepSpeed's configuration dictionary: this module is its one author.

DeepSpeed ignores top-level keys that it does not know and fills in defaults that change gradients, so every key that
matters is written here, and what the user's own file may say is checked against what the flags say.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.config.deepspeed_json import ACCUMULATION, KEYS, OLD_NAMES
from megatron.config.errors import ConfigError
from megatron.config.flags import spell

if TYPE_CHECKING:
    from megatron.config.sections import RunConfig

Path = tuple[str, ...]

_SWITCHES = {ACCUMULATION: "--global-batch-size", "bf16.enabled": "--precision", "fp16.enabled": "--precision"}

OWNED: dict[str, str] = _SWITCHES | {
    key.path: " and ".join(spell(other.field) for other in KEYS if other.path == key.path) for key in KEYS
}
"""Where a value of the file has a flag of the same meaning: they must agree."""

FIXED: dict[str, str] = {
    "managed_gradient_accumulation": "the engine says itself where a step ends",
    "gradient_allreduce_op": "the loss is normalised for gradients that are averaged",
    "pipeline.pipe_partitioned": "a partitioned stage boundary gives wrong gradients under sequence parallelism",
    "pipeline.grad_partitioned": "a partitioned stage boundary gives wrong gradients under sequence parallelism",
    "bf16.check_grad_overflow": "a step with a gradient that is not finite is skipped",
    "zero_optimization.compute_grad_norm": "the gradient norm is always reported",
    "zero_optimization.load_from_fp32_weights": "a resumed run continues bit for bit",
    "zero_optimization.elastic_checkpoint": "a resumed run continues bit for bit",
    "optimizer.params.adam_w_mode": "--optimizer adam is AdamW",
    "checkpoint.load_universal": "checkpoints are loaded in the layout that saved them",
}
"""Values that the framework relies on; the file may repeat them."""

REFUSED: dict[str, str] = {
    "scheduler": "the learning rate is the framework's: use --lr-decay-style and the --lr-* flags",
    "activation_checkpointing": "recompute is the framework's: use --recompute-granularity",
    "torch_autocast": "use --precision",
    "data_efficiency": "batches are the framework's: use --rampup-batch-size",
    "tensor_parallel": "use --tensor-model-parallel-size",
    "expert_parallel": "DeepSpeed's module replacement does not fit this model",
    "sequence_parallel_size": "use --ds-sequence-parallel-size",
    "data_parallel_size": "it is what the other parallel sizes leave of the world",
    "hybrid_engine": "it serves models of other libraries; use tools/generate_text.py",
    "weight_quantization": "it is for inference",
    "autotuning": "it restarts the run with other batch sizes than the flags say",
    "tensorboard": "use --tensorboard-dir",
    "wandb": "use --wandb-project",
    "csv_monitor": "each step is reported as a line of JSON already",
    "comet": "use --tensorboard-dir or --wandb-project",
    "datastates_ckpt": "checkpoints are the framework's: use --save and --save-interval",
    "dataloader_drop_last": "batches are the framework's",
    "disable_allgather": "it has no effect",
    "amp": "DeepSpeed removed it: use --precision",
    "compression_training": "DeepSpeed removed it",
    "curriculum_learning": "DeepSpeed removed it: use --rampup-batch-size",
    "eigenvalue": "DeepSpeed removed it",
    "elasticity": "DeepSpeed removed it: set the batch by --micro-batch-size and --global-batch-size",
    "graph_harvesting": "DeepSpeed removed it",
    "nebula": "DeepSpeed removed it: use --save and --save-interval",
    "progressive_layer_drop": "DeepSpeed removed it",
    "quantize_training": "DeepSpeed removed it",
    "sparse_attention": "DeepSpeed removed it",
    "sparse_gradients": "DeepSpeed removed it",
    "checkpoint.writer": "its files cannot be read back: checkpoints are written by the framework",
    "zero_optimization.cpu_offload": "DeepSpeed renamed it: use --cpu-optimizer",
    "zero_optimization.cpu_offload_param": "DeepSpeed renamed it: use zero_optimization.offload_param",
    "zero_optimization.legacy_stage1": "DeepSpeed removed it",
    "zero_optimization.mics_shard_size": "DeepSpeed removed it",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed removed it",
    "zero_optimization.zeropp_loco_param": "DeepSpeed removed it",
    "optimizer.legacy_fusion": "it is for optimizers without ZeRO",
    "optimizer.params.max_grad_norm": "use --clip-grad",
}

FREE = frozenset(
    {"aio", "comms_logger", "compile", "disable_python_gc", "flops_profiler", "log_level", "vocabulary_size"}
    | {"seq_parallel_communication_data_type", "use_data_before_expert_parallelism"}
)
"""Top-level keys that the framework does not write itself and the file may."""


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
        problems = list(_merge(settings, {OLD_NAMES.get(key, key): value for key, value in user.items()}))
        if problems:
            raise ConfigError(problems)
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
        # Its product adds the bias in place, which a product that selective recompute saves does not survive.
        "memory_efficient_linear": config.kernels.recompute_granularity != "selective",
    }
    if engine.cpu_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
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


def _merge(settings: dict[str, Any], user: Mapping[str, Any]) -> Iterator[str]:
    """Write the user's values into the settings; yield a sentence for each that must not be there."""
    known = set(settings) | FREE | {key for key in REFUSED if "." not in key}
    for key in user:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            advice = f"; did you mean {' or '.join(near)}?" if near else ""
            yield f"--deepspeed_config: DeepSpeed has no top-level key '{key}' and would ignore it{advice}"
    for path, value in _leaves(user, ()):
        problem = _refusal(path) or _contradiction(path, value, settings)
        if problem:
            yield problem
        elif value != "auto" and path[0] in known and ".".join(path) not in OWNED:
            _write(settings, path, value)
    params = settings["optimizer"]["params"]
    if params.get("torch_adam") is False:
        params.pop("fused", None)  # an argument of torch's optimizer alone


def _leaves(values: Mapping[str, Any], prefix: Path) -> Iterator[tuple[Path, Any]]:
    """Every value that is not itself a dictionary, with the keys that lead to it."""
    for key, value in values.items():
        path = (*prefix, _canonical(key, prefix))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _canonical(key: str, prefix: Path) -> str:
    """ZeRO-3's keys exist with and without `stage3_`: one spelling, or the file's value would not replace ours."""
    long = f"stage3_{key}"
    return long if prefix == ("zero_optimization",) and long in STAGE3_KEYS else key


STAGE3_KEYS = frozenset(
    {"stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"}
    | {"stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"}
)


def _refusal(path: Path) -> str | None:
    for length in range(1, len(path) + 1):
        name = ".".join(path[:length])
        if name in REFUSED:
            return f"--deepspeed_config: '{name}' is not supported: {REFUSED[name]}"
    return None


def _contradiction(path: Path, value: Any, settings: Mapping[str, Any]) -> str | None:
    name = ".".join(path)
    if value == "auto" or (name not in OWNED and name not in FIXED):
        return None
    ours = _read(settings, path)
    try:
        if value == ours or _mean_the_same(name, value, ours):
            return None
    except ValueError as error:
        return f"--deepspeed_config says {name} = {value!r}, which should be {error}"
    if name in FIXED:
        return f"--deepspeed_config says {name} = {value!r}, but it must be {ours!r}: {FIXED[name]}; remove it"
    return f"--deepspeed_config says {name} = {value!r}, but {OWNED[name]} makes it {ours!r}: change one of them"


def _mean_the_same(name: str, value: Any, ours: Any) -> bool:
    """Whether two spellings of a value ("Adam" and "AdamW", "fp32" and "float32") set the flags alike."""
    readers = [key.read for key in KEYS if key.path == name]
    return bool(readers) and all(read(value) == read(ours) for read in readers)


def _read(settings: Mapping[str, Any], path: Path) -> Any:
    value: Any = settings
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _write(settings: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        below = settings.setdefault(key, {})
        if not isinstance(below, dict):
            below = settings[key] = {}
        settings = below
    settings[path[-1]] = value
