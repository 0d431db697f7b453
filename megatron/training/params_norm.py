"""The norm of all weights, on request: one more pass over them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron.parallel.groups import ParallelGroups
from megatron.parallel.sharding import sharding_of
from megatron.training.control import Control


@torch.no_grad()
def params_norm(module: nn.Module, groups: ParallelGroups, control: Control) -> float:
    """L2 norm of the model's weights, in the dtype of the forward pass. Every rank calls it.

    Each weight counts once: under ZeRO-3 the replicas add up their shards of it, otherwise the first of them counts it;
    a weight that all tensor ranks hold alike counts on the first of these, one that two stages of a pipeline share on
    the first stage.
    """
    shards = [
        _shard(parameter, groups.replicas.rank) for parameter in module.parameters() if _counts(parameter, groups)
    ]
    own = float(torch.nn.utils.get_total_norm(shards)) if shards else 0.0
    return math.sqrt(math.fsum(norm * norm for norm in control.gather(own)))


def _counts(parameter: nn.Parameter, groups: ParallelGroups) -> bool:
    first_tensor_rank = groups.tensor.rank == 0 or sharding_of(parameter).num_shards > 1
    first_replica = groups.replicas.rank == 0 or hasattr(parameter, "ds_tensor")
    first_stage = not getattr(parameter, "ds_pipe_replicated", False)
    return first_tensor_rank and first_replica and first_stage


def _shard(parameter: nn.Parameter, rank: int) -> Tensor:
    """Give what this rank holds of a parameter, in fp32 and without the padding of ZeRO-3's last shard."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)
    if shard is not parameter:
        held = min(max(parameter.ds_numel - rank * shard.numel(), 0), shard.numel())  # type: ignore[attr-defined]
        shard = shard.flatten()[:held]
    return shard.float()
