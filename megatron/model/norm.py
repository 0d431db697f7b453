"""The norm of a model: LayerNorm or RMSNorm, as its config says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.norm import layer_norm, rms_norm
from megatron.model.context import Context
from megatron.parallel.collectives import sum_gradient
from megatron.parallel.groups import Group
from megatron.parallel.sharding import mark_init


class Norm(nn.Module):
    """Norm over the last dim, of `size` channels; the result has the weight's dtype.

    Args:
        config: `normalization`, `norm_epsilon` and `apply_layernorm_1p`.
        size: number of channels.
        shards: the ranks that each apply this replicated norm to their part of the activations, whose gradients sum up;
            a group of one when every rank applies it to the same ones.
    """

    def __init__(self, config: ModelConfig, size: int, *, shards: Group | None = None) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        self.shards = shards or Group.alone()
        self.weight_offset = 1.0 if config.apply_layernorm_1p else 0.0
        self.weight = nn.Parameter(torch.empty(size))
        mark_init(self.weight, "zeros" if config.apply_layernorm_1p else "ones")
        self.bias = nn.Parameter(torch.empty(size)) if config.normalization == "layernorm" else None
        if self.bias is not None:
            mark_init(self.bias, "zeros")

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Normalise [..., size]."""
        weight = sum_gradient(self.weight, self.shards)
        if self.bias is None:
            return rms_norm(x, weight, self.epsilon, weight_offset=self.weight_offset)
        bias = sum_gradient(self.bias, self.shards)
        return layer_norm(x, weight, bias, self.epsilon, weight_offset=self.weight_offset)
