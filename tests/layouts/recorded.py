"""A whole run of a tiny model from its flags, in any layout, and what came of it in terms of logical tensors."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.parallel.groups import Group, ParallelGroups
from megatron.parallel.sharding import join_shards, sharding_of
from tests.engine.toy import pretend_fp16_works

COMMON = shlex.split(
    """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --init-method-std 0.2
    --vocab-size 29 --make-vocab-size-divisible-by 16 --mock-data --num-workers 0 --precision fp32
    --hidden-dropout 0 --attention-dropout 0 --global-batch-size 4 --train-iters 3 --eval-iters 1 --eval-interval 2
    --optimizer sgd --sgd-momentum 0 --lr 0.5 --min-lr 0.5 --lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0
    --eod-mask-loss --log-interval 1 --log-params-norm --zero-reduce-bucket-size 5000
    """
)
COMMON += ["--deepspeed_config", str(Path(__file__).with_name("zero3.json"))]
"""Masks are uneven, since documents end anywhere, in about half of the samples; the vocabulary is padded; gradients are
clipped; plain SGD shows a wrong scale; ZeRO-3 divides weights that it would keep whole on every rank otherwise."""

MODELS = {
    "gpt2": [],
    "gpt2 untied, documents": shlex.split(
        "--untie-embeddings-and-output-weights --reset-position-ids --reset-attention-mask"
    ),
    "llama": shlex.split(
        """
        --num-key-value-heads 2 --position-embedding-type rope --normalization rmsnorm --activation-function swiglu
        --disable-bias-linear --untie-embeddings-and-output-weights
        """
    ),
    "llama, one key/value head": shlex.split(
        """
        --num-key-value-heads 1 --position-embedding-type rope --normalization rmsnorm --activation-function swiglu
        --disable-bias-linear --untie-embeddings-and-output-weights
        """
    ),
    "llama tied, query norms": shlex.split(
        """
        --num-key-value-heads 2 --position-embedding-type rope --normalization rmsnorm --activation-function swiglu
        --add-qkv-bias --qk-layernorm
        """
    ),
    "gemma": shlex.split(
        """
        --num-key-value-heads 2 --kv-channels 24 --position-embedding-type rope --normalization rmsnorm
        --apply-layernorm-1p --activation-function geglu_tanh --disable-bias-linear --scale-embeddings
        """
    ),
}


@dataclass
class Record:
    """What a run came to, the same on every rank: a number a step, a loss each evaluation, and the full weights."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    params_norms: list[float] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)


def record_all(runs: Sequence[list[str]], poisoned_step: int | None = None) -> list[Record]:
    """Train with each list of flags, one after another, in this rank's process; see `record`."""
    pretend_fp16_works()
    return [record(flags, poisoned_step) for flags in runs]


def record(flags: list[str], poisoned_step: int | None = None) -> Record:
    """Train as `pretrain_gpt.py` does.

    Args:
        flags: beside `COMMON`, over which they win.
        poisoned_step: the step in which one weight's gradient is infinite on the last rank.
    """
    from megatron.config.run import parse_run_config
    from megatron.engine.launch import read_environment
    from megatron.training.build import build_trainer

    environment = read_environment()
    config = parse_run_config([*COMMON, *flags], environment.world_size, rank=environment.rank)
    trainer = build_trainer(config, environment)
    engine, found = trainer.engine, Record()
    found.initial = logical_weights(engine.module, engine.module.groups)
    if poisoned_step is not None and environment.rank == environment.world_size - 1:
        _poison(engine.module, lambda: len(found.losses) == poisoned_step)
    _take_notes(trainer, found, config.training.train_iters)
    assert trainer.fit() == 0
    return found


def _poison(module: nn.Module, now: Callable[[], bool]) -> None:
    weight = next(weight for name, weight in module.named_parameters() if ".mlp." in name)
    weight.register_hook(lambda gradient: gradient * math.inf if now() else None)


def _take_notes(trainer: Any, found: Record, last: int) -> None:
    """Have the trainer's engine write down what comes of each of its calls."""
    engine, params_norm = trainer.engine, trainer._params_norm
    train_step, evaluate = engine.train_step, engine.evaluate

    def noted_step(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        if result.skipped:
            found.skipped.append(len(found.losses))
        found.losses.append(result.loss.item())
        found.grad_norms.append(float(result.grad_norm))
        found.loss_scales.append(result.loss_scale)
        if params_norm is not None:
            found.params_norms.append(params_norm())
        if len(found.losses) == last:
            found.final = logical_weights(engine.module, engine.module.groups)
        return result

    def noted_evaluation(*args: Any) -> Any:
        loss_sum, tokens = evaluate(*args)
        found.evaluations.append((loss_sum / tokens).item())
        return loss_sum, tokens

    engine.train_step, engine.evaluate = noted_step, noted_evaluation


def logical_weights(module: nn.Module, groups: ParallelGroups) -> dict[str, Tensor]:
    """Put every weight together, in fp32: over replicas under ZeRO-3, over tensor ranks, then over the stages."""
    import deepspeed

    parameters = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        own = {name: _join(parameter, groups.tensor).float().cpu() for name, parameter in parameters.items()}
    stages: list[dict[str, Tensor]] = [own] * groups.pipeline.size
    if groups.pipeline.size > 1:
        dist.all_gather_object(stages, own, group=groups.pipeline.handle)
    return {name: weight for stage in stages for name, weight in stage.items()}


def _join(parameter: nn.Parameter, tensor: Group) -> Tensor:
    own = parameter.detach().clone()
    if tensor.size == 1:
        return own
    shards: list[Tensor] = [torch.empty_like(own) for _ in tensor.ranks]
    dist.all_gather(shards, own, group=tensor.handle)
    if sharding_of(parameter).dim is None:
        assert all(torch.equal(shard, own) for shard in shards), "tensor ranks hold different copies"
    return join_shards(shards, sharding_of(parameter))
