"""Rules of the layout over ranks and of DeepSpeed's engine."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.data import DataConfig
from megatron.config.engine import EngineConfig
from megatron.config.flags import spell
from megatron.config.kernels import KernelsConfig
from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.training import TrainingConfig

AXES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "ds_sequence_parallel_size")


def tensor_ranks_divide_the_model(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Each tensor rank holds as many heads, MLP channels, rows of the vocabulary and learned positions."""
    size = parallel.tensor_model_parallel_size
    names = ["num_attention_heads", "ffn_hidden_size", "make_vocab_size_divisible_by"]
    if model.position_embedding_type == "learned_absolute":
        names.append("max_position_embeddings")
    for name in names:
        value = getattr(model, name)
        if value % size:
            yield (
                f"{spell(name)} {value} is not a multiple of --tensor-model-parallel-size {size}: each tensor rank "
                f"holds an equal part; change one of them."
            )


def tensor_ranks_share_key_value_heads(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Each tensor rank holds as many key/value heads, or as many ranks share each of them."""
    size, heads = parallel.tensor_model_parallel_size, model.num_key_value_heads
    if heads % size and size % heads and heads != model.num_attention_heads:
        yield (
            f"--num-key-value-heads {heads} and --tensor-model-parallel-size {size}: one must divide the other; change "
            f"either."
        )
    elif size > heads and 2 * model.kv_channels % (size // heads):
        yield (
            f"--kv-channels {model.kv_channels}: the {2 * model.kv_channels} key and value rows of a head cannot be "
            f"divided over the {size // heads} of --tensor-model-parallel-size {size} ranks that share each of "
            f"--num-key-value-heads {heads}; change one of them."
        )


def a_chunk_holds_a_position(
    kernels: KernelsConfig, parallel: ParallelConfig, training: TrainingConfig
) -> Iterator[str]:
    """A chunk is made of whole positions of a micro-batch, one of every shard of the sequence at least."""
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    least = training.micro_batch_size * shards
    ranks = f" x --tensor-model-parallel-size {shards} (with --sequence-parallel)" if shards > 1 else ""
    for name, everything in (("loss_chunk_size", "all logits at once"), ("mlp_chunk_size", "all tokens at once")):
        if 0 < getattr(kernels, name) < least:
            yield (
                f"{spell(name)} {getattr(kernels, name)} is less than one position of --micro-batch-size "
                f"{training.micro_batch_size}{ranks} = {least} tokens: raise it, or set it to 0 for {everything}."
            )


def compiled_blocks_are_whole(kernels: KernelsConfig, parallel: ParallelConfig, engine: EngineConfig) -> Iterator[str]:
    """A block is one graph only where nothing inside of it talks to other ranks, gathers weights or runs again."""
    if not kernels.compile:
        return
    hindrances = [f"{spell(axis)} {size}" for axis in AXES if (size := getattr(parallel, axis)) > 1]
    if engine.zero_stage == 3:
        hindrances.append("--zero-stage 3")
    if kernels.recompute_granularity != "none":
        hindrances.append(f"--recompute-granularity {kernels.recompute_granularity}")
    if kernels.mlp_chunk_size:
        hindrances.append(f"--mlp-chunk-size {kernels.mlp_chunk_size}")
    if hindrances:
        yield (
            f"--compile makes one graph of a block, which {' and '.join(hindrances)} would break apart: leave one or "
            f"the other out."
        )


def ranks_divide_the_sequence(parallel: ParallelConfig, data: DataConfig) -> Iterator[str]:
    """Ulysses ranks, and under sequence parallelism the tensor ranks of each, hold as many tokens."""
    shards, flags = (
        parallel.ds_sequence_parallel_size,
        f"--ds-sequence-parallel-size {parallel.ds_sequence_parallel_size}",
    )
    if parallel.sequence_parallel:
        shards *= parallel.tensor_model_parallel_size
        flags += f" x --tensor-model-parallel-size {parallel.tensor_model_parallel_size} (with --sequence-parallel)"
    if data.seq_length % shards:
        yield (
            f"--seq-length {data.seq_length} is not a multiple of {flags} = {shards}: each rank holds an equal part of "
            f"the sequence; use --seq-length {-(-data.seq_length // shards) * shards}."
        )


def gathered_inputs_are_of_shards(parallel: ParallelConfig) -> Iterator[str]:
    """Only shards of the sequence are gathered."""
    if parallel.keep_gathered_inputs and not parallel.sequence_parallel:
        yield (
            "--keep-gathered-inputs keeps what tensor ranks gather of the sequence, of which they hold shards with "
            "--sequence-parallel only: add that, or leave it out."
        )


def shards_of_the_sequence_travel(parallel: ParallelConfig) -> Iterator[str]:
    """What travels beside the computation are shards of the sequence."""
    if parallel.tp_comm_overlap != "none" and not parallel.sequence_parallel:
        yield (
            f"--tp-comm-overlap {parallel.tp_comm_overlap} computes while shards of the sequence travel between tensor "
            f"ranks, which hold some with --sequence-parallel only: add that, or use --tp-comm-overlap none."
        )


def copies_go_with_whole_products(parallel: ParallelConfig, kernels: KernelsConfig) -> Iterator[str]:
    """A product that is made a shard at a time has neither one result to keep, nor one scale."""
    if parallel.tp_comm_overlap != "copies" or parallel.tensor_model_parallel_size == 1:
        return
    hindrances = ["--fp8"] if kernels.fp8 else []
    if kernels.recompute_granularity == "products":
        hindrances.append("--recompute-granularity products")
    if hindrances:
        yield (
            f"--tp-comm-overlap copies with {' and '.join(hindrances)}: a product that is made a shard at a time has "
            f"no result to keep and no scale of its own; use --tp-comm-overlap none or halves, or leave that out."
        )


def halves_are_equal(parallel: ParallelConfig, training: TrainingConfig) -> Iterator[str]:
    """A micro-batch has two halves of whole samples."""
    if parallel.tp_comm_overlap == "halves" and training.micro_batch_size % 2:
        yield (
            f"--tp-comm-overlap halves cuts a micro-batch in two, and --micro-batch-size {training.micro_batch_size} "
            f"is odd: use {training.micro_batch_size + 1}, or --tp-comm-overlap none."
        )


def halves_find_all_weights(parallel: ParallelConfig, engine: EngineConfig) -> Iterator[str]:
    """Two halves are in different blocks at times, of which ZeRO-3 gathers one after the other."""
    if parallel.tp_comm_overlap == "halves" and engine.zero_stage == 3:
        yield (
            "--tp-comm-overlap halves with --zero-stage 3: the halves are in two blocks at a time, and weights are "
            "gathered for one; use --zero-stage 1 or 2, or --tp-comm-overlap none."
        )


def ulysses_divides_heads(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Ulysses ranks attend with as many of a tensor rank's heads each."""
    tensor, ulysses = parallel.tensor_model_parallel_size, parallel.ds_sequence_parallel_size
    heads = model.num_attention_heads
    if heads % tensor == 0 and heads % (tensor * ulysses):
        yield (
            f"--num-attention-heads {heads} is not a multiple of --tensor-model-parallel-size {tensor} x "
            f"--ds-sequence-parallel-size {ulysses} = {tensor * ulysses}: each rank attends with as many; change "
            f"one of them."
        )


def axes_divide_the_world(parallel: ParallelConfig, world_size: int | None) -> Iterator[str]:
    """The data-parallel size is a whole number."""
    sizes = [getattr(parallel, name) for name in AXES]
    ranks = sizes[0] * sizes[1] * sizes[2]
    if world_size is not None and world_size % ranks:
        product = " x ".join(f"{spell(name)} {size}" for name, size in zip(AXES, sizes, strict=True))
        fewer, more = world_size // ranks * ranks, -(-world_size // ranks) * ranks
        yield (
            f"this launch has {world_size} ranks, which is not a multiple of {product} = {ranks}: start "
            f"{f'{fewer} or ' if fewer else ''}{more} ranks, or change the layout."
        )


def half_precision_needs_zero(training: TrainingConfig, engine: EngineConfig) -> Iterator[str]:
    """DeepSpeed's half-precision wrappers at stage 0 take a wrong norm and apply a dummy step."""
    if training.precision != "fp32" and engine.zero_stage == 0:
        yield (
            f"--zero-stage 0 with --precision {training.precision}: DeepSpeed's half-precision wrappers at ZeRO 0 "
            f"take a wrong gradient norm and apply a dummy step at start; use --zero-stage 1, or --precision fp32."
        )


def host_optimizer_needs_zero(engine: EngineConfig) -> Iterator[str]:
    """DeepSpeed offloads the optimizer under ZeRO only."""
    if engine.cpu_optimizer and engine.zero_stage == 0:
        yield "--cpu-optimizer needs ZeRO, but --zero-stage is 0: use --zero-stage 1, 2 or 3."


def offloaded_weights_need_zero_3(engine: EngineConfig) -> Iterator[str]:
    """Weights that are whole on every rank are never put away."""
    if engine.remote_device != "none" and engine.zero_stage != 3:
        yield (
            f"--remote-device {engine.remote_device} needs weights that ZeRO divides, but --zero-stage is "
            f"{engine.zero_stage}: use --zero-stage 3."
        )


def stages_hold_blocks(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Every pipeline stage has at least one block."""
    stages = parallel.pipeline_model_parallel_size
    if stages > model.num_layers:
        yield (
            f"--pipeline-model-parallel-size {stages} is more than --num-layers {model.num_layers}: each stage needs a "
            f"block; use at most {model.num_layers} stages."
        )


def partition_fits_model_and_stages(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """The partition names one positive number of blocks for each stage, all blocks in sum."""
    text, stages = parallel.pipeline_partition, parallel.pipeline_model_parallel_size
    if text is None:
        return
    said = f"--pipeline-partition {text}"
    if stages == 1:
        yield f"{said} has no effect with --pipeline-model-parallel-size 1: raise that, or drop the partition."
        return
    try:
        counts = parallel.stage_blocks or ()
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        yield f"{said} must be positive whole numbers with commas between them, the blocks of each stage: 6,8,8,2."
    elif len(counts) != stages:
        yield f"{said} names {len(counts)} stages, but --pipeline-model-parallel-size is {stages}: name that many."
    elif sum(counts) != model.num_layers:
        yield f"{said} has {sum(counts)} blocks, but --num-layers is {model.num_layers}: they must be equal."


def pipeline_has_zero_1(
    parallel: ParallelConfig, engine: EngineConfig, world_size: int | None, data_parallel_size: int
) -> Iterator[str]:
    """DeepSpeed's pipeline works with ZeRO-1, and takes a wrong gradient norm without ZeRO."""
    stages, stage = parallel.pipeline_model_parallel_size, engine.zero_stage
    if stages == 1 or stage == 1:
        return
    said = f"--zero-stage {stage} with --pipeline-model-parallel-size {stages}"
    if stage == 0:
        yield f"{said}: DeepSpeed clips by the gradient norm of the first pipeline stage alone; use --zero-stage 1."
        return
    ranks = f" over {stages * data_parallel_size} data-parallel ranks" if world_size else ""
    yield (
        f"{said}: DeepSpeed's pipeline shards optimizer state only; use --zero-stage 1 with these {stages} stages, or "
        f"--pipeline-model-parallel-size 1 with --zero-stage {stage}{ranks}."
    )
