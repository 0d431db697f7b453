"""Small reversible changes between the tensors of a Hugging Face model and a logical tensor.

Each works on tensors of any device, so that shapes are known before anything is read, from tensors on "meta". What
comes back may be a view.

Legend: n query heads, k key/value heads, d head size, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """Between one or more tensors of theirs and one of ours."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Make our tensor of theirs."""

    def split(self, ours: Tensor) -> list[Tensor]:
        """Make their tensors of ours; the inverse."""


@dataclass(frozen=True)
class Same:
    """The same tensor under another name."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Take the only one."""
        return theirs[0]

    def split(self, ours: Tensor) -> list[Tensor]:
        """Give it."""
        return [ours]


@dataclass(frozen=True)
class Transposed:
    """A matrix whose rows are their columns, as GPT-2 keeps the weights of its products; a vector stays."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Turn theirs."""
        return theirs[0].t()

    def split(self, ours: Tensor) -> list[Tensor]:
        """Turn it back."""
        return [ours.t()]


@dataclass(frozen=True)
class Stacked:
    """Matrices of one shape under one another: gate and up of a gated MLP."""

    count: int = 2

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Put them under one another."""
        return torch.cat(list(theirs))

    def split(self, ours: Tensor) -> list[Tensor]:
        """Cut them apart."""
        return list(ours.chunk(self.count))


@dataclass(frozen=True)
class PlusOne:
    """A norm's weight of which we keep what it has beyond one (`--apply-layernorm-1p`), and they the whole.

    Not exact: a weight is rounded where one is added or taken away.
    """

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Take one away."""
        return theirs[0] - 1

    def split(self, ours: Tensor) -> list[Tensor]:
        """Add it."""
        return [ours + 1]


@dataclass(frozen=True)
class Halves:
    """Channels [..., d] of heads that we rotate in neighbouring pairs, and they in halves: pair i is (i, i + d/2)."""

    dim: int = 0

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Put the two channels of each pair beside one another."""
        return self._swap(theirs[0], (2, -1))

    def split(self, ours: Tensor) -> list[Tensor]:
        """Put the first channels of all pairs before the second ones."""
        return [self._swap(ours, (-1, 2))]

    def _swap(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        return x.unflatten(self.dim, shape).transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class GroupedHeads:
    """Query, key and value, each by head, and our one product: for each key/value head its queries, its key, its value.

    Theirs are [n d, ...], [k d, ...] and [k d, ...], ours is [(n + 2k) d, ...]: weights [..., h] and biases alike.
    """

    query_heads: int
    key_value_heads: int
    head_size: int
    interleaved: bool = False
    """Whether we rotate neighbouring channels of a head, while they rotate its halves."""

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Fuse query, key and value."""
        heads = [x.unflatten(0, (self.key_value_heads, -1, self.head_size)) for x in theirs]
        if self.interleaved:
            heads[:2] = [Halves(2).join([x]) for x in heads[:2]]
        return torch.cat(heads, dim=1).flatten(0, 2)

    def split(self, ours: Tensor) -> list[Tensor]:
        """Cut the product into query, key and value."""
        groups = ours.unflatten(0, (self.key_value_heads, -1, self.head_size))
        heads = list(groups.split([self.query_heads // self.key_value_heads, 1, 1], dim=1))
        if self.interleaved:
            heads[:2] = [Halves(2).split(x)[0] for x in heads[:2]]
        return [x.flatten(0, 2) for x in heads]


@dataclass(frozen=True)
class FusedTransposed:
    """GPT-2's one matrix [h, 3 n d] of all queries, all keys, all values, and our rows by head; biases [3 n d] too."""

    heads: GroupedHeads

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Order the rows by head."""
        return self.heads.join(theirs[0].t().chunk(3))

    def split(self, ours: Tensor) -> list[Tensor]:
        """Order them by query, key, value."""
        return [torch.cat(self.heads.split(ours)).t()]
