"""What the user's own DeepSpeed file may say beside the flags, and how it is merged into the settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from megatron.config.deepspeed_json import ACCUMULATION, KEYS, OLD_NAMES
from megatron.config.flags import spell

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
    "checkpoint.load_universal": "every checkpoint is loaded in any layout already",
}
"""Values that the framework relies on; the file may repeat them."""

_HPZ = "zero_optimization.zero_hpz_partition_size gathers weights within groups of ranks"
_NO_NVME = "it is for NVMe, and this version offloads to the host alone"
_TORCH_ON_HOST = "it is of DeepSpeed's own host optimizers, and the step is torch's, on the host as a whole"

REFUSED: dict[str, str] = {
    "scheduler": "the learning rate is the framework's: use --lr-decay-style and the --lr-* flags",
    "activation_checkpointing": "recompute is the framework's: use --recompute-granularity",
    "torch_autocast": "use --precision",
    "data_efficiency": "batches are the framework's: use --rampup-batch-size",
    "tensor_parallel": "use --tensor-model-parallel-size",
    "expert_parallel": "DeepSpeed's module replacement does not fit this model",
    "sequence_parallel_size": "use --ds-sequence-parallel-size",
    "data_parallel_size": "it is what the other parallel sizes leave of the world",
    "compile": "DeepSpeed's compiler is never started here",
    "disable_python_gc": "garbage would never be collected",
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
    "checkpoint.use_node_local_storage": "checkpoints go where --save says, on a file system that all ranks see",
    "checkpoint.writer": "its files cannot be read back: checkpoints are written by the framework",
    "zero_optimization.cpu_offload": "DeepSpeed renamed it: use --cpu-optimizer",
    "zero_optimization.cpu_offload_param": "DeepSpeed renamed it: use --remote-device cpu",
    "zero_optimization.legacy_stage1": "DeepSpeed removed it",
    "zero_optimization.mics_shard_size": f"DeepSpeed removed it: {_HPZ}",
    "zero_optimization.mics_hierarchical_params_gather": f"DeepSpeed removed it: {_HPZ}",
    "zero_optimization.offload_optimizer.nvme_path": _NO_NVME,
    "zero_optimization.offload_optimizer.buffer_count": _NO_NVME,
    "zero_optimization.offload_optimizer.pipeline_read": _NO_NVME,
    "zero_optimization.offload_optimizer.pipeline_write": _NO_NVME,
    "zero_optimization.offload_optimizer.fast_init": _NO_NVME,
    "zero_optimization.offload_optimizer.ratio": _TORCH_ON_HOST,
    "zero_optimization.offload_optimizer.super_offload": _TORCH_ON_HOST,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _TORCH_ON_HOST,
    "zero_optimization.offload_param.nvme_path": _NO_NVME,
    "zero_optimization.offload_param.buffer_count": _NO_NVME,
    "zero_optimization.offload_param.buffer_size": _NO_NVME,
    "zero_optimization.offload_param.max_in_cpu": _NO_NVME,
    "zero_optimization.zero_quantized_nontrainable_weights": "every weight is trained",
    # Its groups are those of whole nodes, tensor ranks and all, and its kernel takes any gradient's bits for fp16.
    "zero_optimization.zero_quantized_gradients": "DeepSpeed ignores it within a node and computes wrong gradients "
    "across nodes, unless they travel in fp16; use zero_optimization.zero_quantized_weights",
    "zero_optimization.zenflow": "it replaces the optimizer's step",
    "zero_optimization.zeropp_loco_param": "DeepSpeed removed it",
    "pipeline.stages": "use --pipeline-model-parallel-size",
    "pipeline.partition": "use --pipeline-partition",
    "pipeline.seed_layers": "weights are drawn by the name of the parameter, whatever the layout",
    "pipeline.activation_checkpoint_interval": "recompute is the framework's: use --recompute-granularity",
    "pipeline.use_reentrant": "recompute is the framework's: use --recompute-granularity",
    "optimizer.legacy_fusion": "it is for optimizers without ZeRO",
    "optimizer.params.max_grad_norm": "use --clip-grad",
}

FREE = frozenset(
    {"aio", "comms_logger", "flops_profiler", "log_level", "vocabulary_size"}
    | {"seq_parallel_communication_data_type", "use_data_before_expert_parallelism"}
)
"""Top-level keys that the framework does not write itself and the file may."""

NESTED: dict[str, frozenset[str]] = {
    "checkpoint": frozenset({"load_universal", "tag_validation", "checkpoint_serialization", "parallel_write"}),
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "optimizer": frozenset({"type", "params"}),
    "optimizer.params": frozenset(
        {"lr", "betas", "eps", "weight_decay", "amsgrad", "momentum", "dampening", "nesterov", "maximize"}
        | {"foreach", "fused", "capturable", "differentiable"}
        | {"adam_w_mode", "torch_adam", "bias_correction", "fp32_optimizer_states"}
    ),
    "pipeline": frozenset(
        {"stages", "partition", "seed_layers", "activation_checkpoint_interval", "pipe_partitioned", "grad_partitioned"}
        | {"use_reentrant"}
    ),
    "timers": frozenset({"throughput"}),
}
"""Inner dictionaries whose unknown keys DeepSpeed ignores, or answers with a traceback; it checks the others itself."""

STAGE3_KEYS = frozenset(
    {"stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"}
    | {"stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"}
)


def merge_user_settings(settings: dict[str, Any], user: Mapping[str, Any]) -> Iterator[str]:
    """Write the user's values into the settings; yield a sentence for each that must not be there.

    Args:
        settings: what the flags say; changed in place.
        user: content of the file of --deepspeed_config; "auto" stands for what the flags say.
    """
    known = known_top_level(settings)
    for path, value in _leaves({OLD_NAMES.get(key, key): value for key, value in user.items()}, ()):
        problem = (
            _refusal(path) or _unknown(path, known) or _misplaced(path, value, settings)
            or _contradiction(path, value, settings)
        )  # fmt: skip
        if problem:
            yield problem
        elif value not in ("auto", {}) and ".".join(path) not in OWNED:
            _write(settings, path, value)
    params = settings["optimizer"]["params"]
    if params.get("torch_adam") is False:
        params.pop("fused", None)  # an argument of torch's optimizer alone


def known_top_level(settings: Mapping[str, Any]) -> frozenset[str]:
    """Return every key that the file may have at its top, be it to be refused with advice."""
    return frozenset(settings) | FREE | {key for key in REFUSED if "." not in key}


def _unknown(path: Path, known_at_top: frozenset[str]) -> str | None:
    for length, key in enumerate(path):
        above = ".".join(path[:length])
        known = NESTED.get(above) if above else known_at_top
        if known is not None and key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            advice = f"; did you mean {' or '.join(near)}?" if near else ""
            return (
                f"--deepspeed_config: DeepSpeed knows no '{'.'.join(path[: length + 1])}' and would ignore it{advice}"
            )
    return None


def _misplaced(path: Path, value: Any, settings: Mapping[str, Any]) -> str | None:
    """Find a dictionary where a value belongs, and the reverse."""
    for length in range(1, len(path)):
        if not isinstance(_read(settings, path[:length]), Mapping | NoneType):
            return f"--deepspeed_config: '{'.'.join(path[:length])}' must be a value, not a dictionary"
    if isinstance(_read(settings, path), Mapping) and not isinstance(value, Mapping):
        return f"--deepspeed_config: '{'.'.join(path)}' is {value!r} but must be a dictionary"
    return None


def _leaves(values: Mapping[str, Any], prefix: Path) -> Iterator[tuple[Path, Any]]:
    """Give every value that is not a dictionary with anything in it, and the keys that lead to it."""
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
        settings = settings.setdefault(key, {})
    settings[path[-1]] = value
