"""The MLP: a product, a nonlinearity, a product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.parallel.chunked_mlp import Activation, chunked_mlp
from megatron.parallel.chunks import SequenceChunks
from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(activation(up)); a gated one takes gate and up from one product, [gate; up].

    With a chunk size its inside exists for so many tokens at a time, and backward makes it again.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        group: Group,
        sequence_parallel: bool = False,
        chunk_size: int = 0,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {"group": group, "sequence_parallel": sequence_parallel, "products": kernels.products}
        hidden, inner, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.activation = kernels.activations[config.activation_function]
        self.activation_adds_bias = kernels.adds_bias
        chunks = SequenceChunks(group=group, size=chunk_size, sequence_parallel=sequence_parallel)
        self.chunks = chunks if chunk_size else None
        blocks = 2 if config.gated else 1
        self.up = ColumnParallelLinear(hidden, blocks * inner, bias=bias, blocks=blocks, **shared)
        self.down = RowParallelLinear(inner, hidden, bias=bias, init="scaled_normal", **shared)

    def forward(self, hidden: Tensor, *, with_bias: bool = True) -> Tensor:
        """[s, b, h] to [s, b, h]; shards [s/t, b, h] to such with sequence parallelism.

        Without the bias, that of the last product is left to the caller.
        """
        if self.chunks is not None:
            return self._in_chunks(hidden, self.chunks, self.down.own_bias if with_bias else None)
        if self.activation_adds_bias:
            inner = self.activation(self.up.product(hidden), self.up.bias)
        else:
            inner = self.activation(self.up(hidden))
        product = self.down if with_bias else self.down.product
        result: Tensor = product(inner)
        return result

    def _in_chunks(self, hidden: Tensor, chunks: SequenceChunks, bias: Tensor | None) -> Tensor:
        activation = Activation(function=self.activation, adds_bias=self.activation_adds_bias)
        up, down = self.up, self.down
        result = chunked_mlp(hidden, up.weight, up.bias, down.weight, activation=activation, chunks=chunks)
        return result if bias is None else result + bias
