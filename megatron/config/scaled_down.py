"""A run made small: the same layout and architecture over fewer layers, heads, channels, tokens and steps.

What a layout does to a model depends on which sizes divide which, not on how large they are. So every size becomes the
smallest that keeps the divisibility, the ratio or the remainder by which the layout treats it. Two things are made
harder than most runs: losses are masked unevenly, and a step has several micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from megatron.config.data import DataConfig
from megatron.config.deepspeed_json import FLAG_PATHS
from megatron.config.engine import EngineConfig
from megatron.config.fp8_rules import MULTIPLE
from megatron.config.kernels import KernelsConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.parser import format_value
from megatron.config.reporting import ReportingConfig
from megatron.config.sections import RunConfig, all_flags
from megatron.config.training import TrainingConfig

GRADIENT_LR = 2.0**20
"""Learning rate of the step that shows the gradient: beside so large a step the weight rounds nothing away."""

ADAM_EPS_SHARE = 0.1
"""Of the root mean square of the gradient's entries: from there on Adam's step is proportional to the gradient."""

INIT_STD = 0.2
"""Wide enough for attention to prefer some tokens to others: at the usual 0.02 a small model averages over them."""

SMALL_BUCKETS: dict[str, Any] = {"zero_reduce_bucket_size": 5000, "zero_allgather_bucket_size": 5000}
"""Elements of a bucket: so few that even small gradients take several."""

TOLD = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "kv_channels"),
    *("pipeline_partition", "seq_length", "vocab_size", "micro_batch_size", "global_batch_size", "loss_scale"),
    *("attention_window", "attention_dropout", "hidden_dropout", "adam_eps"),
)
"""Fields whose change a reader of the comparison wants to know."""


def smallest_world(parallel: ParallelConfig, zero_stage: int) -> int:
    """Count the ranks that show a layout: one line along each of its axes, and two data ranks where nothing else is.

    ZeRO shards over data and Ulysses ranks together, so it wants two of them.
    """
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    ranks *= parallel.ds_sequence_parallel_size
    wants_replicas = zero_stage > 0 and parallel.ds_sequence_parallel_size == 1
    return 2 * ranks if wants_replicas or ranks == 1 else ranks


def scale_down(config: RunConfig, *, data_size: int, steps: int, data_prefix: str) -> RunConfig:
    """Make a run small, without dropout.

    Args:
        config: complete and legal.
        data_size: data-parallel ranks of the small run.
        steps: optimizer steps of it.
        data_prefix: token files to read; ids are below `small_vocabulary(...)`.
    """
    unit = min(config.kernels.recompute_num_layers, 2)
    parallel = _small_parallel(config.parallel, unit)
    multiple = MULTIPLE if config.kernels.fp8 else 1
    model = _small_model(config.model, parallel, config.data.seq_length, multiple)
    return replace(
        config,
        model=replace(model, num_layers=_small_depth(config.model, parallel, unit)),
        parallel=parallel,
        # Without a graph, which repeats the same work, and without copies: the comparison may run on a CPU.
        kernels=replace(config.kernels, recompute_num_layers=unit, cuda_graph=False),
        training=_small_training(config.training, parallel, data_size, steps),
        optimizer=_constant_rates(config.optimizer),
        engine=replace(config.engine, **SMALL_BUCKETS),
        data=_small_data(config.data, parallel, data_prefix),
        checkpoint=type(config.checkpoint)(),
        reporting=ReportingConfig(log_interval=1, progress="plain"),
    )


def on_one_rank(config: RunConfig, *, precision: str) -> RunConfig:
    """Give the same training without parallelism, ZeRO and recompute: what the layout is compared with."""
    stage = 0 if precision == "fp32" else 1  # half precision needs a master copy
    return in_precision(
        replace(
            config,
            parallel=ParallelConfig(distributed_timeout_minutes=config.parallel.distributed_timeout_minutes),
            kernels=without_recompute(config.kernels),
            engine=EngineConfig(zero_stage=stage, **SMALL_BUCKETS),
        ),
        precision,
    )


def in_precision(config: RunConfig, precision: str) -> RunConfig:
    """Give the same training in another precision; in fp32 with the attention backend that suits it.

    "fp8" is that of a run with --fp8.
    """
    if precision == precision_of(config):
        return config
    kernels = replace(config.kernels, fp8=False, fp8_format=None)
    if precision == "fp32":
        kernels = replace(kernels, attention_backend="auto")
    training = replace(config.training, precision=precision, loss_scale=None if precision == "fp32" else 256.0)
    return replace(config, training=training, kernels=kernels)


def precision_of(config: RunConfig) -> str:
    """Name what decides about rounding: that of the products where they have one of their own."""
    return "fp8" if config.kernels.fp8 else config.training.precision


def showing_gradients(config: RunConfig) -> RunConfig:
    """Give one step of plain SGD, from whose weights the gradient can be read."""
    none = ("min_lr", "clip_grad", "sgd_momentum", "weight_decay", "start_weight_decay", "end_weight_decay")
    plain: dict[str, Any] = {"optimizer": "sgd", "lr": GRADIENT_LR, **dict.fromkeys(none, 0.0)}
    return replace(
        config,
        optimizer=replace(config.optimizer, **plain),
        training=replace(config.training, train_iters=1),
    )


def with_gentle_adam(config: RunConfig, grad_norm: float, num_parameters: int) -> RunConfig:
    """Raise Adam's epsilon to a share of the gradient's entries, as they reach it after clipping.

    Gradients that cancel (those of the keys' biases do) are rounding alone, of which a small epsilon makes whole steps.
    """
    optimizer = config.optimizer
    if optimizer.optimizer == "sgd":
        return config
    norm = min(grad_norm, optimizer.clip_grad) if optimizer.clip_grad else grad_norm
    eps = float(f"{ADAM_EPS_SHARE * norm / math.sqrt(num_parameters):.1e}")
    return replace(config, optimizer=replace(optimizer, adam_eps=max(eps, optimizer.adam_eps)))


def with_dropout(config: RunConfig, model: ModelConfig) -> RunConfig:
    """Switch on, at one half, the dropouts that `model` has."""
    attention, hidden = (0.5 if share else 0.0 for share in (model.attention_dropout, model.hidden_dropout))
    return replace(config, model=replace(config.model, attention_dropout=attention, hidden_dropout=hidden))


def without_recompute(kernels: KernelsConfig) -> KernelsConfig:
    """Keep all activations."""
    return replace(kernels, **_defaults(kernels, ("recompute_", "distribute_saved_activations")))


def describe_changes(before: RunConfig, after: RunConfig) -> Iterator[str]:
    """Say what of a run was changed, a few words for each of the fields that tell most."""
    for name in TOLD:
        was, now = (getattr(getattr(config, all_flags()[name].section), name) for config in (before, after))
        if was != now:
            yield f"{name} {format_value(was)} -> {format_value(now)}"


def small_vocabulary(tensor_size: int) -> tuple[int, int]:
    """Give the token ids in use and the divisor of the rows: the last tensor rank's rows are padding in part."""
    divisor = 8 * tensor_size
    return -(-64 // divisor) * divisor - 3, divisor


def without_flags(user: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leave out of the user's DeepSpeed dictionary what flags own: the sections hold those values already."""
    kept: dict[str, Any] = {}
    for key, value in user.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner = without_flags(value, f"{path}.")
            if inner or not value:
                kept[key] = inner
        elif path not in FLAG_PATHS:
            kept[key] = value
    return kept


def _defaults(section: Any, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Give the defaults of those fields of a section whose names start so."""
    return {field.name: field.default for field in fields(section) if field.name.startswith(prefixes)}


def _small_parallel(parallel: ParallelConfig, unit: int) -> ParallelConfig:
    """Give each stage the blocks of one unit of recompute, and one more where others have fewer."""
    counts = parallel.stage_blocks or ()
    return replace(
        parallel,
        tp_comm_overlap="none" if parallel.tp_comm_overlap == "copies" else parallel.tp_comm_overlap,
        pipeline_partition=",".join(str(unit + (count > min(counts))) for count in counts) or None,
        distributed_timeout_minutes=min(parallel.distributed_timeout_minutes, 2.0),
    )


def _small_model(model: ModelConfig, parallel: ParallelConfig, seq_length: int, multiple: int) -> ModelConfig:
    """Give a rank's part of each weight multiples of `multiple` features."""
    tensor = parallel.tensor_model_parallel_size
    heads, key_value_heads = _small_heads(model, parallel)
    head_size = _small_head_size(model, tensor, multiple)
    attended = heads * head_size
    ratio = model.hidden_size / (model.num_attention_heads * model.kv_channels)
    step = max(multiple, 8)
    hidden = attended if ratio == 1 else max(step * round(attended * ratio / step), 16)
    inner = hidden * model.ffn_hidden_size / model.hidden_size / tensor
    _, divisor = small_vocabulary(tensor)
    length = _small_length(parallel)
    longer = model.max_position_embeddings > seq_length
    return replace(
        model,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        kv_channels=head_size,
        ffn_hidden_size=tensor * multiple * max(round(inner / multiple), 4 // min(multiple, 4)),
        max_position_embeddings=2 * length if longer else length,
        make_vocab_size_divisible_by=divisor,
        attention_window=-(-model.attention_window * length // seq_length),
        init_method_std=INIT_STD,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def _small_heads(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Give as few query and key/value heads as are dealt out to tensor and Ulysses ranks in the same way.

    The query heads of a group stay as many; a tensor rank keeps two key/value heads where it had two or more.
    """
    tensor, ulysses = parallel.tensor_model_parallel_size, parallel.ds_sequence_parallel_size
    held = model.num_key_value_heads
    group = model.num_attention_heads // held
    if held % tensor:  # fewer than ranks
        return model.num_attention_heads, held
    shared = math.gcd(ulysses, held // tensor)
    for each in range(min(2, held // tensor), held // tensor):
        if math.gcd(ulysses, each) == shared and group * each % ulysses == 0:
            return group * each * tensor, each * tensor
    return model.num_attention_heads, held


def _small_head_size(model: ModelConfig, tensor: int, multiple: int) -> int:
    sharers = max(tensor // model.num_key_value_heads, 1)
    size = max(8, multiple)
    while size < model.kv_channels:
        rotated = int(size * model.rotary_percent)
        rotates = model.position_embedding_type != "rope" or (rotated > 0 and rotated % 2 == 0)
        if rotates and 2 * size % (sharers * multiple) == 0:
            return size
        size *= 2
    return model.kv_channels


def _small_length(parallel: ParallelConfig) -> int:
    """Give about 32 tokens, of which all ranks that divide sequences or positions hold as many."""
    tensor, ulysses = parallel.tensor_model_parallel_size, parallel.ds_sequence_parallel_size
    shards = ulysses * tensor
    return shards * max(-(-32 // shards), 2)


def _small_depth(model: ModelConfig, parallel: ParallelConfig, unit: int) -> int:
    """Give each stage a unit of blocks, and one of them a block more: units and stages differ where they may."""
    if parallel.stage_blocks is not None:
        return sum(parallel.stage_blocks)
    return min(parallel.pipeline_model_parallel_size * unit + 1, model.num_layers)


def _small_training(training: TrainingConfig, parallel: ParallelConfig, data_size: int, steps: int) -> TrainingConfig:
    stages = parallel.pipeline_model_parallel_size
    micro_batch = min(training.micro_batch_size, 2)
    micro_batches = 2 if stages == 1 else stages + 1
    unset: dict[str, Any] = dict.fromkeys(
        ("train_samples", "train_tokens", "exit_interval", "exit_duration_in_mins", "kill_switch_file")
    )
    return replace(
        training,
        **unset,
        micro_batch_size=micro_batch,
        global_batch_size=micro_batch * data_size * micro_batches,
        rampup_batch_size=(),
        train_iters=steps,
        eval_iters=0,
        skip_train=False,
        exit_signal_handler=False,
        loss_scale=256.0 if training.precision == "fp16" else None,  # nothing overflows in a small model
    )


def _constant_rates(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Keep the peak learning rate: schedules are functions of counters, the same in every layout."""
    return replace(
        optimizer,
        **_defaults(optimizer, ("lr_",)) | {"lr_decay_style": "constant"},
        start_weight_decay=optimizer.weight_decay,
        end_weight_decay=optimizer.weight_decay,
        weight_decay_incr_style="constant",
    )


def _small_data(data: DataConfig, parallel: ParallelConfig, prefix: str) -> DataConfig:
    vocabulary, _ = small_vocabulary(parallel.tensor_model_parallel_size)
    unset: dict[str, Any] = dict.fromkeys(("tokenizer_model", "vocab_file", "merge_file", "data_cache_path"))
    return replace(
        data,
        **unset,
        data_path=(prefix,),
        split="1,0,0",
        train_data_path=(),
        valid_data_path=(),
        test_data_path=(),
        mock_data=False,
        seq_length=_small_length(parallel),
        num_workers=0,
        eod_mask_loss=True,
        tokenizer_type="NullTokenizer",
        vocab_size=vocabulary,
    )
