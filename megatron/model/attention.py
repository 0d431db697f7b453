"""Self-attention between its two products.

Legend: s sequence, b micro-batch, h hidden, n query heads, k key/value heads, d head size; n and k are those of this
tensor rank.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.attention.interface import AttentionBackend
from megatron.model.context import Context
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.random import rank_stream
from megatron.parallel.sharding import divide


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads.

    Query, key and value are one product. Its rows are ordered by key/value head: the query heads of the group, then its
    key, then its value, so that a tensor rank holds whole groups.

    Args:
        config: sizes, biases and dropout.
        layer: index of the block, which finds its keys and values in a cache.
        group: the tensor group.
        backend: computes softmax(query key^T) value.
        rotary: rotates queries and keys by position, or nothing.
        sequence_parallel: whether the hidden states are this rank's shard of the sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layer: int,
        group: Group,
        backend: AttentionBackend,
        rotary: Rotary | None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.group = group
        self.backend = backend
        self.rotary = rotary
        self.head_size = config.kv_channels
        self.dropout = config.attention_dropout
        self.kv_heads = divide(kv_heads, group, "--num-key-value-heads")
        self.queries_per_group = heads // kv_heads
        qkv_size = kv_heads * (self.queries_per_group + 2) * self.head_size
        self.qkv = ColumnParallelLinear(
            hidden, qkv_size, bias=config.add_qkv_bias, group=group, sequence_parallel=sequence_parallel
        )
        self.query_norm = Norm(config, self.head_size, shards=group) if config.qk_layernorm else None
        self.key_norm = Norm(config, self.head_size, shards=group) if config.qk_layernorm else None
        self.output = RowParallelLinear(
            heads * self.head_size,
            hidden,
            bias=config.add_bias_linear,
            group=group,
            init="scaled_normal",
            sequence_parallel=sequence_parallel,
        )

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """[s, b, h] to [s, b, h]; shards [s/t, b, h] to such with sequence parallelism."""
        query_sbnd, key_sbkd, value_sbkd = self._split_heads(self.qkv(hidden))
        if self.query_norm is not None and self.key_norm is not None:
            query_sbnd, key_sbkd = self.query_norm(query_sbnd), self.key_norm(key_sbkd)
        if self.rotary is not None:
            query_sbnd = self.rotary(query_sbnd, context.offset, context.position_ids)
            key_sbkd = self.rotary(key_sbkd, context.offset, context.position_ids)
        if context.cache is not None:
            key_sbkd, value_sbkd = context.cache.append(self.layer, key_sbkd, value_sbkd)
        dropout = self.dropout if self.training else 0.0
        # Tensor ranks hold different heads, so each drops weights of its own.
        with rank_stream(self.group, hidden.device) if dropout else nullcontext():
            attended_sbnd = self.backend.attend(
                query_sbnd,
                key_sbkd,
                value_sbkd,
                scale=1 / math.sqrt(self.head_size),
                causal=context.attention_mask is None,
                dropout=dropout,
                mask=context.attention_mask,
            )
        return self.output(attended_sbnd.flatten(2))

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take query [s,b,n,d], key and value [s,b,k,d] apart, by one split: its backward is one concatenation."""
        groups = qkv.unflatten(-1, (self.kv_heads, self.queries_per_group + 2, self.head_size))
        query, key, value = groups.split([self.queries_per_group, 1, 1], dim=3)
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
