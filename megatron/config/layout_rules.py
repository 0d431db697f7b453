"""Rules of the layout over ranks and of DeepSpeed's engine."""

# ruff: noqa: D401, D404 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.engine import EngineConfig
from megatron.config.flags import spell
from megatron.config.parallel import ParallelConfig
from megatron.config.training import TrainingConfig

AXES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "ds_sequence_parallel_size")


def layouts_are_data_parallel_for_now(parallel: ParallelConfig) -> Iterator[str]:
    """This version splits the batch over ranks and nothing else."""
    for name in AXES:
        size = getattr(parallel, name)
        if size != 1:
            yield (
                f"{spell(name)} {size}: this version has data parallelism only; leave it at 1, and use --zero-stage 3 "
                f"for models that one device cannot hold."
            )
    if parallel.sequence_parallel:
        yield "--sequence-parallel: this version has no tensor parallelism, which it is a part of; drop the flag."


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
