"""A whole run of a tiny model from its flags, in any layout, and what came of it in terms of logical tensors."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.parallel.groups import Group, ParallelGroups
from megatron.parallel.sharding import join_shards, sharding_of

COMMON = shlex.split(
    """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --init-method-std 0.2
    --vocab-size 29 --make-vocab-size-divisible-by 16 --mock-data --num-workers 0 --precision fp32
    --hidden-dropout 0 --attention-dropout 0 --global-batch-size 4 --train-iters 3 --eval-iters 1 --eval-interval 100
    --optimizer sgd --sgd-momentum 0 --lr 0.5 --min-lr 0.5 --lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0
    --eod-mask-loss --log-interval 1 --log-params-norm --zero-reduce-bucket-size 5000
    """
)
"""Masks are uneven, since documents end anywhere, in about half of the samples; the vocabulary is padded; gradients are
clipped; plain SGD shows a wrong scale."""

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
    "llama tied, query norms": shlex.split(
        """
        --num-key-value-heads 2 --position-embedding-type rope --normalization rmsnorm --activation-function swiglu
        --add-qkv-bias --qk-layernorm
        """
    ),
}


@dataclass
class Record:
    """What a run came to, the same on every rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    params_norms: list[float] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)


def record_all(runs: Sequence[list[str]]) -> list[Record]:
    """Train with each list of flags, one after another, in this rank's process."""
    return [record(flags) for flags in runs]


def record(flags: list[str]) -> Record:
    """Train as `pretrain_gpt.py` does."""
    from megatron.config.run import parse_run_config
    from megatron.engine.launch import read_environment
    from megatron.training.build import build_trainer

    gc.freeze()  # ZeRO-3 collects garbage at each start: half a second over all that was imported
    environment = read_environment()
    config = parse_run_config([*COMMON, *flags], environment.world_size, rank=environment.rank)
    trainer = build_trainer(config, environment)
    engine, found = trainer.engine, Record()
    groups = engine.module.groups
    found.initial = logical_weights(engine.module, groups)
    train_step, params_norm = engine.train_step, trainer._params_norm

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        found.losses.append(result.loss.item())
        found.grad_norms.append(float(result.grad_norm))
        if len(found.losses) == config.training.train_iters:
            found.final = logical_weights(engine.module, groups)
        found.params_norms.append(params_norm())
        return result

    engine.train_step = noted
    assert trainer.fit() == 0
    return found


def logical_weights(module: nn.Module, groups: ParallelGroups) -> dict[str, Tensor]:
    """Put every weight together: over replicas where ZeRO-3 has split it, over tensor ranks, then over the stages."""
    import deepspeed

    parameters = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        own = {name: _join(parameter, groups.tensor) for name, parameter in parameters.items()}
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
