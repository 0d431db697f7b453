"""Ulysses: attention over sequences that are divided over ranks (Jacobs et al. 2023, arXiv:2309.14509).

Everything but attention works on each token alone and so on a shard of the sequence. Around attention the ranks trade:
each gives the other ranks' heads of its tokens for the other tokens of its heads, attends to whole sequences with a few
heads, and trades back. A rank sends 1/u of what tensor parallelism would, and the more ranks, the less each sends.

Legend: s sequence, u ranks of the Ulysses group, b micro-batch, d head size; n query heads and k key/value heads, both
as the tensor rank has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.errors import ConfigError
from megatron.parallel.groups import Group


@dataclass(frozen=True)
class UlyssesAttention:
    """An attend function over whole sequences, made one over shards of them. On a group of one it is the same function.

    Attributes:
        attend: takes query [s, b, n', d], key and value [s, b, k', d], with n' a multiple of k' whose query head i
            reads key/value head i // (n' / k'), and returns [s, b, n', d].
        group: the Ulysses group. Rank r holds the positions `sequence_shard(s, group)` and attends with the r-th part
            of the heads.
    """

    attend: Callable[..., Tensor]
    group: Group

    def __call__(self, query_sbnd: Tensor, key_sbkd: Tensor, value_sbkd: Tensor, **options: Any) -> Tensor:
        """Attend from this rank's tokens to those of the whole sequence.

        Key/value heads are repeated, as few times as it takes, until the ranks divide them; autograd sums the gradients
        of the copies. The exchange is one collective where query, key and value agree in everything but their heads.

        Args:
            query_sbnd: [s/u, b, n, d].
            key_sbkd: [s/u, b, k, d].
            value_sbkd: as the keys.
            options: handed on. They speak of whole sequences: a mask is [b, 1, s, s].

        Returns:
            [s/u, b, n, d].

        Raises:
            ConfigError: the ranks do not divide the query heads.
            ValueError: there are more keys than queries, from a cache.
        """
        ranks = self.group.size
        if ranks == 1:
            return self.attend(query_sbnd, key_sbkd, value_sbkd, **options)
        if query_sbnd.shape[2] % ranks:
            raise ConfigError(
                [
                    f"--ds-sequence-parallel-size {ranks} does not divide the {query_sbnd.shape[2]} query heads of a "
                    "tensor rank (--num-attention-heads / --tensor-model-parallel-size): lower it or change the heads"
                ]
            )
        if key_sbkd.shape[0] != query_sbnd.shape[0]:
            raise ValueError(
                f"Ulysses exchanges whole sequences, but there are {query_sbnd.shape[0]} queries and "
                f"{key_sbkd.shape[0]} keys: generate with --ds-sequence-parallel-size 1"
            )
        copies = ranks // math.gcd(ranks, key_sbkd.shape[2])
        if copies > 1:
            key_sbkd, value_sbkd = (x.repeat_interleave(copies, dim=2) for x in (key_sbkd, value_sbkd))
        query_sbnd, key_sbkd, value_sbkd = sequences_for_heads([query_sbnd, key_sbkd, value_sbkd], self.group)
        return heads_for_sequences(self.attend(query_sbnd, key_sbkd, value_sbkd, **options), self.group)


def sequence_shard(seq_length: int, group: Group) -> range:
    """Positions that this rank's shard holds; `.start` is the offset of its first token.

    Args:
        seq_length: s.
        group: the Ulysses group.

    Raises:
        ConfigError: the ranks do not divide the sequence.
    """
    if seq_length % group.size:
        raise ConfigError(
            [
                f"--seq-length {seq_length} cannot be divided over --ds-sequence-parallel-size {group.size}: make it a "
                f"multiple of {group.size} or lower the number of ranks"
            ]
        )
    length = seq_length // group.size
    return range(group.rank * length, (group.rank + 1) * length)


def sequences_for_heads(shards: list[Tensor], group: Group) -> list[Tensor]:
    """Trade heads for tokens: each [s/u, b, heads, d] becomes [s, b, heads/u, d].

    Backward trades the gradients back. Tensors that agree in all but their heads travel in one collective, copied once.

    Raises:
        ValueError: the ranks do not divide the heads.
    """
    if group.size == 1:
        return shards
    blocks = [_heads_by_rank(shard, group) for shard in shards]
    kinds = {(*block.shape[:3], block.shape[4], block.dtype) for block in blocks}
    if len(kinds) > 1:
        return [_Exchange.apply(block.contiguous(), group).flatten(0, 1) for block in blocks]
    whole = _Exchange.apply(torch.cat(blocks, dim=3), group).flatten(0, 1)
    return list(whole.split([block.shape[3] for block in blocks], dim=2))


def heads_for_sequences(whole_sbnd: Tensor, group: Group) -> Tensor:
    """Trade tokens for heads, the inverse of `sequences_for_heads`: [s, b, n/u, d] becomes [s/u, b, n, d]."""
    if group.size == 1:
        return whole_sbnd
    exchanged = _Exchange.apply(whole_sbnd.unflatten(0, (group.size, -1)).contiguous(), group)
    return exchanged.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Block i of dim 0 goes to rank i, in the place of this rank's own number. It is its own inverse and conjugate."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: Group) -> Tensor:
        ctx.group = group
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group.handle)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad.contiguous(), ctx.group), None


def _heads_by_rank(shard: Tensor, group: Group) -> Tensor:
    """View [s/u, b, heads, d] as [u, s/u, b, heads/u, d]: the heads of each rank."""
    if shard.shape[2] % group.size:
        raise ValueError(f"{shard.shape[2]} heads cannot be divided over {group.size} ranks")
    return shard.unflatten(2, (group.size, -1)).permute(2, 0, 1, 3, 4)
