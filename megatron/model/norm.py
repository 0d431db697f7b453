"""The norm of a model: LayerNorm or RMSNorm, as its config says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.model.context import Context
from megatron.parallel.gradient_sums import SumsGradients
from megatron.parallel.groups import Group
from megatron.parallel.sharding import mark_init


class Norm(SumsGradients):
    """Norm over the last dim, of `size` channels; the result has the weight's dtype.

    Args:
        config: `normalization`, `norm_epsilon` and `apply_layernorm_1p`.
        size: number of channels.
        shards: the ranks that each apply this replicated norm to their part of the activations, whose gradients sum up;
            a group of one when every rank applies it to the same ones.
        kernels: what computes it.
    """

    def __init__(
        self, config: ModelConfig, size: int, *, shards: Group | None = None, kernels: Kernels = PLAIN
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.centred = config.normalization == "layernorm"
        self.epsilon = config.norm_epsilon
        self.shards = shards or Group.alone()
        self.weight_offset = 1.0 if config.apply_layernorm_1p else 0.0
        self.weight = nn.Parameter(torch.empty(size))
        mark_init(self.weight, "zeros" if config.apply_layernorm_1p else "ones")
        self.bias = nn.Parameter(torch.empty(size)) if self.centred else None
        if self.bias is not None:
            mark_init(self.bias, "zeros")

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Normalise [..., size]."""
        normed: Tensor = self.kernels.norm(x, *self._weight_and_bias(), **self._settings())
        return normed

    def of_stream(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise a residual stream [..., size]; return the stream, to be used from here on, and its norm."""
        stream, normed = self.kernels.stream_norm(x, *self._weight_and_bias(), **self._settings())
        return stream, normed

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Add `delta` to a residual stream [..., size]; return the sum and its norm."""
        stream, normed = self.kernels.add_norm(x, delta, *self._weight_and_bias(), **self._settings())
        return stream, normed

    @property
    def summed_parameters(self) -> tuple[nn.Parameter, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def summing_group(self) -> Group:
        """The ranks that each apply the norm to their part of the activations."""
        return self.shards

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        weight, *bias = self.read()
        return weight, bias[0] if bias else None

    def _settings(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "weight_offset": self.weight_offset, "centred": self.centred}
