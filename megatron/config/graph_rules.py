"""Rules of the work that a GPU repeats as it was recorded."""

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

UNRECORDED_AXES = ("pipeline_model_parallel_size", "ds_sequence_parallel_size")


def graphs_repeat_what_was_recorded(
    kernels: KernelsConfig, parallel: ParallelConfig, data: DataConfig
) -> Iterator[str]:
    """The blocks do the same for each micro-batch, and talk to tensor ranks alone."""
    if not kernels.cuda_graph:
        return
    hindrances = [f"{spell(axis)} {size}" for axis in UNRECORDED_AXES if (size := getattr(parallel, axis)) > 1]
    hindrances += [spell(name) for name in ("reset_position_ids", "reset_attention_mask") if getattr(data, name)]
    if kernels.recompute_granularity != "none":
        hindrances.append(f"--recompute-granularity {kernels.recompute_granularity}")
    if kernels.mlp_chunk_size:
        hindrances.append(f"--mlp-chunk-size {kernels.mlp_chunk_size}")
    hindrances += [spell(name) for name in ("fp8", "compile") if getattr(kernels, name)]
    if hindrances:
        yield (
            f"--cuda-graph repeats for every micro-batch what a rank did for the first, which "
            f"{' and '.join(hindrances)} would not: leave one or the other out."
        )


def graphs_draw_from_one_stream(kernels: KernelsConfig, parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Where tensor ranks drop apart, the host seeds a stream for each, but for fused dropout, which drops by place."""
    if not kernels.cuda_graph or parallel.tensor_model_parallel_size == 1:
        return
    apart = {
        f"--attention-dropout {model.attention_dropout}": model.attention_dropout > 0,
        f"--hidden-dropout {model.hidden_dropout} and --no-fused-kernels": (
            model.hidden_dropout > 0 and kernels.no_fused_kernels and parallel.sequence_parallel
        ),
    }
    if drops := [said for said, does in apart.items() if does]:
        yield (
            f"--cuda-graph with --tensor-model-parallel-size {parallel.tensor_model_parallel_size} and "
            f"{' and '.join(drops)}: the host seeds what each rank drops, and would do so once; use a probability of "
            f"0, or leave --cuda-graph out."
        )


def gradients_of_graphs_are_taken_at_once(
    kernels: KernelsConfig, training: TrainingConfig, engine: EngineConfig
) -> Iterator[str]:
    """All micro-batches leave their gradients at one place, from which fp32 sums of bf16 gradients take them."""
    if not kernels.cuda_graph:
        return
    asked = {
        f"--zero-stage {engine.zero_stage}": engine.zero_stage != 1,
        f"--precision {training.precision}": training.precision != "bf16",
        "--no-accumulate-allreduce-grads-in-fp32": not training.accumulate_allreduce_grads_in_fp32,
        "--cpu-optimizer": engine.cpu_optimizer,
    }
    if others := [said for said, is_other in asked.items() if is_other]:
        yield (
            f"--cuda-graph with {' and '.join(others)}: all micro-batches leave their gradients at one place, and only "
            f"--zero-stage 1 with --precision bf16, sums in fp32 and the optimizer on the GPU takes them from there in "
            f"time; use these, or leave --cuda-graph out."
        )
