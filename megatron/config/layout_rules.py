"""Rules of the layout over ranks and of DeepSpeed's engine."""

# ruff: noqa: D401, D404 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.data import DataConfig
from megatron.config.engine import EngineConfig
from megatron.config.flags import spell
from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.training import TrainingConfig

AXES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "ds_sequence_parallel_size")


def layouts_have_one_stage_for_now(parallel: ParallelConfig) -> Iterator[str]:
    """This version splits layers and batches over ranks, not the sequence of layers."""
    if parallel.pipeline_model_parallel_size != 1:
        yield (
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}: this version has no pipeline; "
            f"leave it at 1; --tensor-model-parallel-size or --zero-stage 3 split a model that is too large."
        )


def layouts_have_whole_sequences_for_now(parallel: ParallelConfig) -> Iterator[str]:
    """This version has no Ulysses."""
    if parallel.ds_sequence_parallel_size != 1:
        yield (
            f"--ds-sequence-parallel-size {parallel.ds_sequence_parallel_size}: this version has no Ulysses; leave it "
            f"at 1, and use --tensor-model-parallel-size with --sequence-parallel for long sequences."
        )


def tensor_ranks_divide_the_model(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Each tensor rank holds as many heads, MLP channels and rows of the vocabulary."""
    size = parallel.tensor_model_parallel_size
    names = ["num_attention_heads", "num_key_value_heads", "ffn_hidden_size", "make_vocab_size_divisible_by"]
    if model.num_key_value_heads == model.num_attention_heads:
        names.remove("num_key_value_heads")  # the user gave one number
    for name in names:
        value = getattr(model, name)
        if value % size:
            yield (
                f"{spell(name)} {value} is not a multiple of --tensor-model-parallel-size {size}: each tensor rank "
                f"holds an equal part; change one of them."
            )


def tensor_ranks_divide_the_sequence(parallel: ParallelConfig, data: DataConfig) -> Iterator[str]:
    """Under sequence parallelism each tensor rank holds as many tokens."""
    size = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and data.seq_length % size:
        yield (
            f"--sequence-parallel with --seq-length {data.seq_length}, which is not a multiple of "
            f"--tensor-model-parallel-size {size}: each tensor rank holds an equal shard of the sequence; use "
            f"--seq-length {-(-data.seq_length // size) * size}, or drop --sequence-parallel."
        )


def axes_divide_the_world(parallel: ParallelConfig, world_size: int | None) -> Iterator[str]:
    """The data-parallel size is a whole number."""
    sizes = [getattr(parallel, name) for name in AXES]
    ranks = sizes[0] * sizes[1] * sizes[2]
    if world_size is not None and world_size % ranks:
        product = " x ".join(f"{spell(name)} {size}" for name, size in zip(AXES, sizes, strict=True))
        yield f"this launch has {world_size} ranks, which is not a multiple of {product} = {ranks}."


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
