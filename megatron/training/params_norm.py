"""The norm of all weights, on request: one more pass over them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron.training.control import Control


@torch.no_grad()
def params_norm(module: nn.Module, control: Control, copies: int) -> float:
    """L2 norm of the model's weights, in the dtype of the forward pass. Every rank calls it.

    Args:
        module: what this rank trains: the whole model, its ZeRO-3 shards of it, or its stage of a pipeline. A weight
            that two stages share counts on the first.
        control: all ranks.
        copies: number of ranks that hold the same weights, unless ZeRO-3 shards them.
    """
    parameters = [parameter for parameter in module.parameters() if not getattr(parameter, "ds_pipe_replicated", False)]
    shards = [_shard(parameter, control.rank) for parameter in parameters]
    own = float(torch.nn.utils.get_total_norm(shards)) if shards else 0.0
    if any(hasattr(parameter, "ds_tensor") for parameter in parameters):
        copies = 1
    if copies == control.size:
        return own
    return math.sqrt(math.fsum(norm * norm for norm in control.gather(own)) / copies)


def _shard(parameter: nn.Parameter, rank: int) -> Tensor:
    """Give what this rank holds of a parameter, in fp32 and without the padding of ZeRO-3's last shard."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)
    if shard is not parameter:
        held = min(max(parameter.ds_numel - rank * shard.numel(), 0), shard.numel())  # type: ignore[attr-defined]
        shard = shard.flatten()[:held]
    return shard.float()
