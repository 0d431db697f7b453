"""What carries pieces of activations between the ranks of a group while products run beside it.

A collective moves a whole tensor, and the product that needs it waits. Products that are computed piece by piece
(`overlap.py`) need less: swaps. In a swap each rank sends a piece to the rank that is `distance` places after it in the
group, and receives the piece of the rank that is as many places before it. Every rank of a group asks for the same
swaps in the same order, as it does with collectives.

`Messages` carries them by send and receive of torch.distributed, everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.groups import Group


class Swap(Protocol):
    """A piece under way in both directions."""

    def wait(self) -> Tensor:
        """Make what arrives readable (on a GPU: for what the current stream does next) and return it.

        From here on the piece that was sent may be changed, too.
        """
        ...

    def done(self) -> None:
        """Say that all reads of what arrived have been asked for: its place may be used again after them."""
        ...


class Transport(Protocol):
    """Starts swaps among the ranks of a group.

    Attributes:
        name: what it is called on the command line.
        group: the ranks.
        piece_bytes: the most that a piece should have.
        slots: how many swaps of one distance may be under way: started and not yet `done`.
    """

    name: str
    group: Group
    piece_bytes: int
    slots: int

    def swap(self, outgoing: Tensor, distance: int, into: Tensor | None = None) -> Swap:
        """Start to send a contiguous piece and to receive one of the same shape.

        Args:
            outgoing: not to be changed before `wait`.
            distance: 1 .. ranks - 1; sends to the rank so many places after this one.
            into: where to put what arrives, contiguous; it then stays there, and `done` is not needed. None: a place
                that belongs to the transport.
        """
        ...

    def place(self, source: Tensor, into: Tensor) -> None:
        """Start to copy this rank's own part to where swaps put those of the others; ready after any later `wait`."""
        ...


def cut_rows(num_rows: int, row_bytes: int, piece_bytes: int) -> list[slice]:
    """Cut rows into as few pieces of at most `piece_bytes` as there can be, and of equal size as far as it goes."""
    most = max(piece_bytes // max(row_bytes, 1), 1)
    count = max(-(-num_rows // most), 1)
    bounds = [num_rows * index // count for index in range(count + 1)]
    return [slice(first, end) for first, end in itertools.pairwise(bounds)]


class Messages:
    """Swaps by the messages of torch.distributed. On GPUs a kernel of NCCL carries them, which takes some processors.

    Args:
        group: the ranks, two at least.
        piece_bytes: the most that a piece should have.
    """

    name = "messages"
    slots = 4

    def __init__(self, group: Group, piece_bytes: int = 2**24) -> None:
        self.group = group
        self.piece_bytes = piece_bytes

    def swap(self, outgoing: Tensor, distance: int, into: Tensor | None = None) -> Swap:
        """See `Transport.swap`."""
        group = self.group
        received = torch.empty_like(outgoing) if into is None else into
        target, source = (group.ranks[(group.rank + places) % group.size] for places in (distance, -distance))
        # Both in one call: NCCL would otherwise finish sending before it begins to receive, on all ranks.
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, target, group.handle),
                dist.P2POp(dist.irecv, received, source, group.handle),
            ]
        )
        return _Message(outgoing, received, works)

    def place(self, source: Tensor, into: Tensor) -> None:
        """See `Transport.place`."""
        into.copy_(source)


class _Message:
    """A swap by messages; it holds on to the piece that is sent until that has left."""

    def __init__(self, outgoing: Tensor, received: Tensor, works: Sequence[dist.Work]) -> None:
        self._outgoing: Tensor | None = outgoing
        self._received = received
        self._works = works

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        self._outgoing = None
        return self._received

    def done(self) -> None:
        """Nothing is used again: what arrives has memory of its own."""
