"""Self-attention between its two products.

Legend: s sequence, b micro-batch, h hidden, n query heads, k key/value heads, d head size; n and k are those of this
tensor rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.model.context import Context
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.collectives import Gathering
from megatron.parallel.groups import Group
from megatron.parallel.linear import RowOutput, RowParallelLinear
from megatron.parallel.qkv import QueryKeyValueLinear
from megatron.parallel.random import rank_stream


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads.

    Query, key and value are one product. Its rows are ordered by key/value head: the query heads of the group, then its
    key, then its value.

    Args:
        config: sizes, biases and dropout.
        layer: index of the block, which finds its keys and values in a cache.
        group: the tensor group.
        attend: computes softmax(query key^T) value, whether or not sequences are divided over ranks.
        rotary: rotates queries and keys by position, or nothing.
        sequence_parallel: whether the hidden states are this rank's shard of the sequence.
        keep_gathered: whether the first product keeps what it gathered of them.
        kernels: what computes the products and the norms of query and key, and cuts their product.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layer: int,
        group: Group,
        attend: Callable[..., Tensor],
        rotary: Rotary | None,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.group = group
        self.attend = attend
        self.split_heads = kernels.split_heads
        self.rotary = rotary
        self.head_size = config.kv_channels
        self.dropout = config.attention_dropout
        self.window = config.attention_window
        self.softcap = config.attention_softcap
        self.qkv = QueryKeyValueLinear(
            hidden,
            query_heads=heads,
            key_value_heads=kv_heads,
            head_size=self.head_size,
            bias=config.add_qkv_bias,
            group=group,
            sequence_parallel=sequence_parallel,
            keep_gathered=keep_gathered,
            products=kernels.products,
        )
        self.query_norm = Norm(config, self.head_size, shards=group, kernels=kernels) if config.qk_layernorm else None
        self.key_norm = Norm(config, self.head_size, shards=group, kernels=kernels) if config.qk_layernorm else None
        self.output = RowParallelLinear(
            heads * self.head_size,
            hidden,
            bias=config.add_bias_linear,
            group=group,
            init="scaled_normal",
            sequence_parallel=sequence_parallel,
            products=kernels.products,
        )

    def forward(self, hidden: Tensor, context: Context, *, with_bias: bool = True) -> Tensor:
        """[s, b, h] to [s, b, h]; shards [s/t, b, h] to such with sequence parallelism.

        Without the bias, that of the last product is left to the caller.
        """
        return self.attend_to(self.project(self.gather(hidden)), context, with_bias=with_bias).wait()

    def gather(self, hidden: Tensor) -> Tensor | Gathering:
        """Start to bring together what `project` takes."""
        return self.qkv.gather(hidden)

    def project(self, hidden: Tensor | Gathering) -> Tensor:
        """Make queries, keys and values in one product, as `attend_to` takes them."""
        return self.qkv.product(hidden)

    def attend_to(self, product: Tensor, context: Context, *, with_bias: bool = True) -> RowOutput:
        """Do the rest of `forward` but for the end of the sum over the ranks."""
        query_sbnd, key_sbkd, value_sbkd = self._heads(product, context)
        if context.cache is not None:
            key_sbkd, value_sbkd = context.cache.append(self.layer, key_sbkd, value_sbkd)
        dropout = self.dropout if self.training else 0.0
        # Tensor ranks hold different heads, so each drops weights of its own.
        with rank_stream(self.group, product.device) if dropout else nullcontext():
            attended_sbnd = self.attend(
                query_sbnd,
                key_sbkd,
                value_sbkd,
                scale=1 / math.sqrt(self.head_size),
                causal=context.attention_mask is None,
                dropout=dropout,
                mask=context.attention_mask,
                documents=context.documents,
                window=self.window if context.attention_mask is None else 0,
                softcap=self.softcap,
            )
        return self.output.start(attended_sbnd.flatten(2), with_bias=with_bias)

    def _heads(self, product: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Make query [s, b, n, d], key and value [s, b, k, d], at their positions."""
        where = (context.offset, context.position_ids)
        if self.rotary is not None and self.query_norm is None and self.qkv.is_grouped:
            return self.rotary.split(product, self.qkv.key_value_heads, self.head_size, *where)
        if self.qkv.is_grouped:
            query_sbnd, key_sbkd, value_sbkd = self.split_heads(product, self.qkv.key_value_heads, self.head_size)
        else:
            query_sbnd, key_sbkd, value_sbkd = self.qkv.heads(product)
        if self.query_norm is not None and self.key_norm is not None:
            query_sbnd, key_sbkd = self.query_norm(query_sbnd), self.key_norm(key_sbkd)
        if self.rotary is not None:
            query_sbnd, key_sbkd = self.rotary(query_sbnd, *where), self.rotary(key_sbkd, *where)
        return query_sbnd, key_sbkd, value_sbkd
