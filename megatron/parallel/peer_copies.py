"""Collectives of shards as copies: each rank reads what it needs out of the memory of the others.

A matrix product fills a GPU's multiprocessors and gives none of them up before it ends, so that kernels of NCCL beside
it make it longer by what they take themselves. Copy engines move the same bytes and need no multiprocessor.

Each rank has one buffer that the others may read. It fills its own when all have read what was in it before, tells them
that it is full, and reads theirs; what is larger than a buffer goes in pieces. Between two ranks there are two flags,
each set by one of them and cleared by the other, which waits for it, so that it does not matter which collective comes
next, or whether it was recorded as part of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

FULL, FREE = 0, 1
"""Flags: what the other rank has for this one lies in its buffer; the other rank has read this one's buffer."""
NUM_FLAGS = 2
ALIGNMENT = 256
"""Bytes that places in a buffer are multiples of."""


class PeerMemory(Protocol):
    """A buffer on each rank of a group, which all of them read, and flags of one rank for another.

    At the start every rank has FREE from each other one.

    Attributes:
        rank: this process's place in the group.
        size: ranks of the group.
        num_bytes: length of a buffer, a multiple of `ALIGNMENT` times the ranks.
    """

    rank: int
    size: int
    num_bytes: int

    def buffer(self, rank: int) -> Tensor:
        """Return a rank's buffer, uint8 [num_bytes]."""
        ...

    def tell(self, rank: int, flag: int) -> None:
        """Set this rank's flag at another one, after the copies before."""
        ...

    def take(self, rank: int, flag: int) -> None:
        """Let the copies after this wait for another rank's flag, and clear it."""
        ...

    def beside(self) -> AbstractContextManager[Callable[[], None]]:
        """Let copies run beside what comes after, but behind what came before; gives what waits for them."""
        ...


class Copying:
    """Copies under way; like the work of `torch.distributed`, and keeps what they read until they are waited for."""

    def __init__(self, wait: Callable[[], None], reads: Tensor, finish: Callable[[], object] | None = None) -> None:
        self._wait = wait
        self._reads: Tensor | None = reads
        self._finish = finish

    def wait(self) -> None:
        """Make the output ready for what comes next."""
        self._wait()
        if self._finish is not None:
            self._finish()
        self._reads = self._finish = None


class PeerCopies:
    """All-gather and reduce-scatter along dim 0 over peer memory; all ranks call them in the same order."""

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        rank, size = memory.rank, memory.size
        self._others = [(rank + distance) % size for distance in range(1, size)]  # each rank begins with another one

    def all_gather(self, whole: Tensor, shard: Tensor) -> Copying:
        """Start to fill `whole`, [t n, ...], with the shards [n, ...] of all ranks; both are contiguous."""
        memory, own = self._memory, _bytes(shard)
        places = _bytes(whole).view(memory.size, -1)
        with memory.beside() as wait:
            for piece in _pieces(own.numel(), memory.num_bytes):
                self._fill((own[piece],))
                places[memory.rank, piece].copy_(own[piece])
                for other, buffer in self._filled():
                    places[other, piece].copy_(buffer[: piece.stop - piece.start])
        return Copying(wait, shard)

    def reduce_scatter(self, shard: Tensor, summand: Tensor) -> Copying:
        """Start to fill `shard`, [n, ...], with this rank's slice of the sum of all [t n, ...]; both are contiguous.

        Two ranks' slices are added as they are; more of them in fp32, in the order of ranks.
        """
        memory, parts = self._memory, summand.view(self._memory.size, *shard.shape)
        slices = _bytes(summand).view(memory.size, -1)
        # One other rank's slice can arrive where the sum will be.
        arrived = shard.unsqueeze(0) if memory.size == 2 else torch.empty_like(parts)
        arrivals = _bytes(arrived).view(arrived.shape[0], -1)
        room = memory.num_bytes // memory.size
        with memory.beside() as wait:
            for piece in _pieces(slices.shape[1], room):
                length = piece.stop - piece.start
                self._fill(tuple(slices[rank, piece] for rank in range(memory.size)), room)
                for other, buffer in self._filled():
                    place = 0 if memory.size == 2 else other
                    arrivals[place, piece].copy_(buffer[memory.rank * room :][:length])

        def finish() -> None:
            if memory.size == 2:
                shard.add_(parts[memory.rank])
            else:
                arrived[memory.rank].copy_(parts[memory.rank])
                torch.sum(arrived, dim=0, out=shard)

        return Copying(wait, summand, finish)

    def _fill(self, parts: tuple[Tensor, ...], room: int = 0) -> None:
        """Put a part for each rank, or one for all, into this rank's buffer, and tell the others."""
        memory = self._memory
        for other in self._others:
            memory.take(other, FREE)
        own = memory.buffer(memory.rank)
        for place, part in enumerate(parts):
            if len(parts) == 1 or place != memory.rank:
                own[place * room :][: part.numel()].copy_(part)
        for other in self._others:
            memory.tell(other, FULL)

    def _filled(self) -> Iterator[tuple[int, Tensor]]:
        """Give the other ranks and their buffers, each for as long as the caller copies out of it."""
        for other in self._others:
            self._memory.take(other, FULL)
            yield other, self._memory.buffer(other)
            self._memory.tell(other, FREE)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _pieces(num_bytes: int, room: int) -> Iterator[slice]:
    for start in range(0, num_bytes, room):
        yield slice(start, min(start + room, num_bytes))
