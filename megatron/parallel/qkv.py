"""The product that makes queries, keys and values of grouped attention, its heads spread over the tensor ranks.

Legend: s sequence, b micro-batch, n query heads, k key/value heads, g = n / k query heads a group, d head size, t ranks
of the tensor group, c = t / k ranks that share a key/value head where there are more ranks than those.

The logical weight has the rows of one key/value group after the other: its g query heads, its key head, its value head.
A rank holds 1/t of them, each row on one rank only:

| case   | a rank's rows                                                                             |
|--------|-------------------------------------------------------------------------------------------|
| k >= t | k/t whole groups                                                                          |
| k < t  | of one group: g/c query heads and the c-th part of its key and value rows, taken together |

In the second case c ranks attend with the same key and value. Copies of the rows on each of them would be counted c
times in the gradient norm, or, without the tag that says so, not at all on most ranks; and their gradients would have
to be summed. Instead each of the c ranks computes its part of the key and value, once, and the parts are exchanged:
as many bytes forward and backward as the sum of the copies' gradients, less arithmetic, and weights, gradients and
optimizer states that are divided like any others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.errors import ConfigError
from megatron.parallel.collectives import Gathering
from megatron.parallel.groups import Group
from megatron.parallel.linear import column_parallel_product, gathered_input
from megatron.parallel.products import PLAIN, Products
from megatron.parallel.sharding import divide, mark_init, mark_sharded


class QueryKeyValueLinear(nn.Module):
    """Column-parallel product that returns this rank's query heads and the key and value heads that these read.

    Parameters are empty until initialised (`mark_init`). Their names and logical shapes are those of a plain linear
    layer with (n + 2k) d output features.

    Args:
        hidden_size: size of the last dimension of the input.
        query_heads: n, of all ranks together.
        key_value_heads: k, of all ranks together; divides n.
        head_size: d.
        bias: whether to add a bias.
        group: the tensor group.
        sequence_parallel: whether the input is this rank's shard of the sequence.
        keep_gathered: whether what was gathered of shards is kept for backward, which gathers them again otherwise.
        products: what multiplies; None: torch's own products.

    Raises:
        ConfigError: the ranks do not divide the query heads, or neither of ranks and key/value heads divides the other.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        query_heads: int,
        key_value_heads: int,
        head_size: int,
        bias: bool,
        group: Group,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        products: Products | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.keep_gathered = keep_gathered
        self.products = products or PLAIN
        self.head_size = head_size
        self.query_heads = divide(query_heads, group, "--num-attention-heads")
        self.sharers = _ranks_sharing_a_head(key_value_heads, head_size, group)
        self.key_value_heads = key_value_heads * self.sharers // group.size
        features = (query_heads + 2 * key_value_heads) * head_size
        blocks = (query_heads // key_value_heads, 2)
        self.weight = nn.Parameter(torch.empty(features // group.size, hidden_size))
        mark_sharded(self.weight, 0, group, (features, hidden_size), blocks=blocks, groups=key_value_heads)
        mark_init(self.weight, "normal")
        self.bias = nn.Parameter(torch.empty(features // group.size)) if bias else None
        if self.bias is not None:
            mark_sharded(self.bias, 0, group, (features,), blocks=blocks, groups=key_value_heads)
            mark_init(self.bias, "zeros")

    @property
    def is_grouped(self) -> bool:
        """Whether `product` holds whole groups of [query heads; key; value]: no head is spread over ranks."""
        return self.sharers == 1

    def gather(self, hidden: Tensor) -> Tensor | Gathering:
        """Start to bring together what `product` multiplies."""
        return gathered_input(hidden, self.group, self.products, sequence_parallel=self.sequence_parallel)

    def product(self, hidden: Tensor | Gathering) -> Tensor:
        """Multiply hidden states [s, b, h], or [s/t, b, h] with sequence parallelism, or what `gather` made of them."""
        return column_parallel_product(
            hidden,
            self.weight,
            self.bias,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            keep_gathered=self.keep_gathered,
            products=self.products,
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply [s, b, h] hidden states, or [s/t, b, h] with sequence parallelism.

        Returns:
            query [s, b, n/t, d], key and value [s, b, k/t, d] ([s, b, 1, d] where there are more ranks than heads).
        """
        return self.heads(self.product(hidden))

    def heads(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut what `product` gave into what `forward` gives."""
        # One split and, at most, one exchange: their backward is one concatenation and one exchange.
        if self.sharers == 1:
            groups = product.unflatten(-1, (self.key_value_heads, -1, self.head_size))
            query, key, value = groups.split([groups.shape[3] - 2, 1, 1], dim=3)
            return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
        query_size = self.query_heads * self.head_size
        query, part = product.split([query_size, product.shape[-1] - query_size], dim=-1)
        key_value = exchange_parts(part, self.group, self.sharers).unflatten(-1, (2, 1, self.head_size))
        key, value = key_value.unbind(dim=2)
        return query.unflatten(-1, (self.query_heads, self.head_size)), key, value


def exchange_parts(part: Tensor, group: Group, sharers: int) -> Tensor:
    """Concatenate, along the last dim, the parts that each run of `sharers` neighbouring ranks of the group holds.

    Each rank then computes with the whole; in backward the gradients of a part are summed over the ranks of its run.

    Args:
        part: [..., w], of the same shape on every rank.
        group: its ranks 0 .. sharers - 1 are the first run, and so on.
        sharers: divides the group's size.

    Returns:
        [..., sharers * w].
    """
    return part if sharers == 1 else _ExchangeParts.apply(part, group, sharers)


class _ExchangeParts(torch.autograd.Function):
    """All-gather among neighbours forward, reduce-scatter among them backward.

    Both are written as an all-to-all of the tensor group that leaves the other ranks out, so that no further groups
    have to be made. The sum of backward is torch's own, which adds half precision up in fp32.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, sharers: int) -> Tensor:
        ctx.group, ctx.sharers = group, sharers
        received = _swap_with_neighbours(part.expand(sharers, *part.shape), group)
        return received.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        summands = _swap_with_neighbours(grad.unflatten(-1, (ctx.sharers, -1)).movedim(-2, 0), ctx.group)
        return summands.sum(dim=0), None, None


def _swap_with_neighbours(blocks: Tensor, group: Group) -> Tensor:
    """Send block i of dim 0 to the i-th rank of this rank's run, and return what each of them sent, in their order."""
    sharers = blocks.shape[0]
    first = group.rank // sharers * sharers
    counts = [int(first <= rank < first + sharers) for rank in range(group.size)]
    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, counts, counts, group=group.handle)
    return received


def _ranks_sharing_a_head(key_value_heads: int, head_size: int, group: Group) -> int:
    """Return c: how many ranks attend with the same key/value head.

    Raises:
        ConfigError: heads or rows of a head cannot be spread evenly.
    """
    if key_value_heads % group.size == 0:
        return 1
    sharers = group.size // key_value_heads
    if group.size % key_value_heads:
        raise ConfigError(
            [
                f"--num-key-value-heads {key_value_heads} and --tensor-model-parallel-size {group.size}: one must "
                "divide the other; change either"
            ]
        )
    if 2 * head_size % sharers:
        raise ConfigError(
            [
                f"--kv-channels {head_size}: the {2 * head_size} key and value rows of a head cannot be divided over "
                f"the {sharers} ranks that share it; lower --tensor-model-parallel-size {group.size} or raise "
                f"--num-key-value-heads {key_value_heads}"
            ]
        )
    return sharers
