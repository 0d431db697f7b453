"""The weights that an optimizer steps, put together from the ranks over which ZeRO has divided them."""

from __future__ import annotations

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


@torch.no_grad()
def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copy every weight of an engine's module to the host, fp32. All ranks that share the weights call it together.

    Under half precision it is the master copy, which the optimizer steps; what it steps by can be read from it.

    Returns:
        name of parameter -> tensor that this rank would hold without ZeRO: its shard over the tensor ranks.
    """
    weights = {}
    for name, parameter in module.named_parameters():
        master = safe_get_full_fp32_param(parameter)  # None without ZeRO
        weights[name] = (parameter if master is None else master).detach().to("cpu", torch.float32, copy=True)
    return weights
