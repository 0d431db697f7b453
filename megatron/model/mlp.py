"""The MLP: a product, a nonlinearity, a product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(activation(up)); a gated one takes gate and up from one product, [gate; up]."""

    def __init__(
        self, config: ModelConfig, *, group: Group, sequence_parallel: bool = False, kernels: Kernels = PLAIN
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {"group": group, "sequence_parallel": sequence_parallel, "products": kernels.products}
        hidden, inner, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.activation = kernels.activations[config.activation_function]
        self.activation_adds_bias = kernels.adds_bias
        blocks = 2 if config.gated else 1
        self.up = ColumnParallelLinear(hidden, blocks * inner, bias=bias, blocks=blocks, **shared)
        self.down = RowParallelLinear(inner, hidden, bias=bias, init="scaled_normal", **shared)

    def forward(self, hidden: Tensor, *, with_bias: bool = True) -> Tensor:
        """[s, b, h] to [s, b, h]; shards [s/t, b, h] to such with sequence parallelism.

        Without the bias, that of the last product is left to the caller.
        """
        if self.activation_adds_bias:
            inner = self.activation(self.up.product(hidden), self.up.bias)
        else:
            inner = self.activation(self.up(hidden))
        product = self.down if with_bias else self.down.product
        result: Tensor = product(inner)
        return result
