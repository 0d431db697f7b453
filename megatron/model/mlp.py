"""The MLP: a product, a nonlinearity, a product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.parallel.chunked_mlp import Activation, chunked_mlp
from megatron.parallel.chunks import SequenceChunks
from megatron.parallel.collectives import Gathering, Scattering
from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, RowOutput, RowParallelLinear


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
        keep_gathered: bool = False,
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
        self.up = ColumnParallelLinear(
            hidden, blocks * inner, bias=bias, blocks=blocks, keep_gathered=keep_gathered, **shared
        )
        self.down = RowParallelLinear(inner, hidden, bias=bias, init="scaled_normal", **shared)

    def forward(self, hidden: Tensor, *, with_bias: bool = True) -> Tensor:
        """[s, b, h] to [s, b, h]; shards [s/t, b, h] to such with sequence parallelism.

        Without the bias, that of the last product is left to the caller.
        """
        return self.contract(self.expand(self.gather(hidden)), with_bias=with_bias).wait()

    def gather(self, hidden: Tensor) -> Tensor | Gathering:
        """Start to bring together what `expand` takes."""
        return hidden if self.chunks is not None else self.up.gather(hidden)

    def expand(self, hidden: Tensor | Gathering) -> Tensor:
        """Make the first product, as `contract` takes it; in chunks it is made there."""
        if self.chunks is not None and isinstance(hidden, Tensor):
            return hidden
        return self.up.product(hidden, None if self.activation_adds_bias else self.up.bias)

    def contract(self, inner: Tensor, *, with_bias: bool = True) -> RowOutput:
        """Do the rest of `forward` but for the end of the sum over the ranks."""
        if self.chunks is not None:
            return RowOutput(Scattering(self._in_chunks(inner, self.chunks)), self.down.own_bias if with_bias else None)
        inner = self.activation(inner, self.up.bias) if self.activation_adds_bias else self.activation(inner)
        return self.down.start(inner, with_bias=with_bias)

    def _in_chunks(self, hidden: Tensor, chunks: SequenceChunks) -> Tensor:
        activation = Activation(function=self.activation, adds_bias=self.activation_adds_bias)
        up, down = self.up, self.down
        return chunked_mlp(hidden, up.weight, up.bias, down.weight, activation=activation, chunks=chunks)
