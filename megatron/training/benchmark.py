"""One measured run on synthetic tokens: speed, FLOPs and memory, and the memory that the formulas predict."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.config.derived import data_parallel_size
from megatron.config.sections import RunConfig
from megatron.engine.launchers import RankEnvironment
from megatron.kernels.attention.interface import AttentionBackend
from megatron.kernels.attention.sdpa import BACKEND as FUSED_ATTENTION
from megatron.kernels.registry import find_implementations
from megatron.model.flops import model_flops_per_token
from megatron.model.gpt import padded_vocab_size
from megatron.parallel.groups import Group, ParallelGroups
from megatron.training.build import build_trainer
from megatron.training.build_engine import plan_recompute, predict_memory, with_partition
from megatron.training.cluster import Cluster
from megatron.training.memory import MemoryPlan
from megatron.training.recompute import GIB, Recompute
from megatron.training.step_cost import StepCost, predict_step

Figures = dict[str, Any]


def measure_run(environment: RankEnvironment, config: RunConfig, folder: Path) -> Figures:
    """Train as `pretrain_gpt.py` does and return this rank's figures; every rank calls it, in a process of its own.

    What counts is the last reporting interval of the ordinary loop, optimizer steps and data included, so that nothing
    is timed that a run does not do, and the host waits for the device at its end alone.

    Args:
        environment: this process's rank.
        config: of a run on synthetic tokens, from `for_measuring`.
        folder: where rank 0's reports go.

    Raises:
        UserError: the run cannot be built.
    """
    started = time.monotonic()
    trainer = build_trainer(config, environment)
    build_seconds = time.monotonic() - started
    trainer.fit()
    device = trainer.engine.device
    figures: Figures = {"build_seconds": build_seconds, "device": "cpu", "torch": torch.__version__}
    attention = getattr(trainer.engine.module, "attention", None)
    if attention is not None:  # a stage of a pipeline does not say
        figures["attention"] = attention.name
    if device.type == "cuda":
        figures |= {
            "device": torch.cuda.get_device_name(device),
            "allocated_gib": trainer.peak_gib,
            "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    if environment.rank == 0:
        figures |= _reported(config, folder, environment.world_size)
    return figures


def for_measuring(config: RunConfig, steps: int, folder: Path, *, warm_up: int | None = None) -> RunConfig:
    """Let a run train for `steps` after as many that warm up, report after every `steps`, and do nothing else.

    Args:
        config: the run.
        steps: those that count.
        folder: where the reports go.
        warm_up: steps before them, a multiple of `steps`; None: as many.
    """
    return replace(
        config,
        training=replace(config.training, train_iters=steps + (steps if warm_up is None else warm_up), eval_iters=0),
        reporting=replace(
            config.reporting, log_interval=steps, progress="plain", metrics_file=str(_metrics_file(folder))
        ),
    )


def join_figures(ranks: list[Figures]) -> Figures:
    """Take rank 0's figures, and the memory of the fullest rank."""
    joined = dict(ranks[0])
    for name in {"allocated_gib", "reserved_gib"} & joined.keys():
        joined[name] = max(rank[name] for rank in ranks)
    return joined


def predict_run(config: RunConfig, world_size: int, *, on_gpu: bool = True) -> MemoryPlan:
    """Predict the peak of a run on synthetic tokens, without starting it; on GPUs with the fused kernels."""
    config, groups, recompute = plan_run(config, world_size)
    fused = on_gpu and not (config.kernels.no_fused_kernels or config.kernels.no_cross_entropy_loss_fusion)
    return predict_memory(config, config.data.vocab_size or 0, groups, recompute, fused=fused)


def predict_seconds(config: RunConfig, world_size: int, cluster: Cluster) -> StepCost:
    """Predict what a step of a run on synthetic tokens takes, without starting it."""
    config, _, recompute = plan_run(config, world_size)
    rows = padded_vocab_size(config.data.vocab_size or 0, config.model.make_vocab_size_divisible_by)
    return predict_step(config, rows, recompute, world_size, cluster)


def plan_run(config: RunConfig, world_size: int) -> tuple[RunConfig, ParallelGroups, Recompute]:
    """Divide a run on synthetic tokens over stages and ranks, none of which communicate, and plan its recompute."""
    parallel = config.parallel
    config = with_partition(config, config.data.vocab_size or 0)
    data_size = data_parallel_size(parallel, world_size)
    groups = ParallelGroups(
        world=_planned(world_size),
        replicas=_planned(data_size * parallel.ds_sequence_parallel_size),
        pipeline=_planned(parallel.pipeline_model_parallel_size),
        data=_planned(data_size),
        ulysses=_planned(parallel.ds_sequence_parallel_size),
        tensor=_planned(parallel.tensor_model_parallel_size),
    )
    backends = find_implementations("megatron.kernels.attention", AttentionBackend)
    attention = backends.get(config.kernels.attention_backend, FUSED_ATTENTION)  # which of them auto is, a GPU tells
    return config, groups, plan_recompute(config, groups, attention)


def _planned(size: int) -> Group:
    return Group(ranks=tuple(range(size)), rank=0, handle=None)


def _metrics_file(folder: Path) -> Path:
    return folder / "metrics.jsonl"


def _reported(config: RunConfig, folder: Path, world_size: int) -> Figures:
    """Read the last report, and count the causal half of attention beside the whole."""
    lines = _metrics_file(folder).read_text(encoding="utf-8").splitlines()
    *_, report = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    rows = padded_vocab_size(config.data.vocab_size or 0, config.model.make_vocab_size_divisible_by)
    full, causal = (
        model_flops_per_token(config.model, rows, config.data.seq_length, causal=causal) for causal in (False, True)
    )
    mfu, steps = report["mfu"], config.reporting.log_interval
    return {
        "steps": steps,
        "warm_up_steps": (config.training.train_iters or 0) - steps,
        "ms_per_step": report["elapsed_ms_per_step"],
        "tokens_per_second_per_gpu": report["tokens_per_second"] / world_size,
        "tflops_full": report["model_tflops"],
        "tflops_causal": report["model_tflops"] * causal / full,
        "tflops_hardware": report["hardware_tflops"],
        "mfu_full": mfu,
        "mfu_causal": None if mfu is None else mfu * causal / full,
        "overhead_ms_per_step": report["timers_ms"]["overhead"],
        "data_ms_per_step": report["timers_ms"]["data"],
        "agreement_ms_per_step": report["timers_ms"]["agreement"],
        "lm_loss": report["lm_loss"],
    }
