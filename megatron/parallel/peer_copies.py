"""Shards that travel between ranks as copies into each other's memory, a piece at a time.

A matrix product fills a GPU's multiprocessors and gives none of them up before it ends, so that a kernel of NCCL beside
it makes it longer by what it takes itself. Copy engines move the same bytes and need no multiprocessor.

On each rank there is room for pieces of every other one, in slots. A rank copies a piece to where there is room for it,
and tells the other that it is there; that one computes with it where it lies, and tells when it is done. Between two
ranks each slot has two flags, each set by one of them and cleared by the other, which waits for it, so that it does not
matter which piece comes next, or whether it was recorded as part of a graph.

A rank never lets a stream wait for what another rank will only later ask of its own: a piece is sent when the host has
asked for the work on the one that was in its slot. The host may wait for the whole GPU in between, as it does for new
memory, and ranks that waited for each other's hosts would wait for ever.

Legend: n rows of a shard, t ranks, w width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FULL, FREE = 0, 1
"""Flags: a piece of the other rank lies here; the other rank has room for a piece of this one."""
NUM_FLAGS = 2
SLOTS = 4
GATHERED, SCATTERED = (0, 1), (2, 3)
"""Slots of pieces of either kind: they are on their way at the same time."""
ALIGNMENT = 256
"""Bytes that the room for a piece is a multiple of."""


class PeerMemory(Protocol):
    """Room for pieces on each rank of a group, and flags of one rank for another.

    At the start every rank has FREE from each other one for each slot.

    Attributes:
        rank: this process's place in the group.
        size: ranks of the group.
        num_bytes: of a piece at most.
    """

    rank: int
    size: int
    num_bytes: int

    def room(self, at: int, of: int, slot: int) -> Tensor:
        """Return the room at a rank for a piece of another one, uint8 [num_bytes]; one of both is this rank."""
        ...

    def tell(self, rank: int, flag: int, slot: int) -> None:
        """Set this rank's flag at another one, once what the stream did before is done."""
        ...

    def take(self, rank: int, flag: int, slot: int) -> None:
        """Let what the stream does next wait for another rank's flag, and clear it."""
        ...

    def beside(self, action: Callable[[], None]) -> Callable[[], None]:
        """Let what an action copies and tells go on beside what comes after; it starts behind what came before.

        Returns:
            what waits for it.
        """
        ...


class Piece(NamedTuple):
    """Rows of a shard that travel together, and the slot that they take."""

    rows: slice
    slot: int


class PeerCopies:
    """Gathers shards for products, and sums up shards of products; all ranks call the same, in the same order."""

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        rank, size = memory.rank, memory.size
        self._others = [(rank + distance) % size for distance in range(1, size)]  # each rank begins with another one
        self._slots = {kind: itertools.cycle(kind) for kind in (GATHERED, SCATTERED)}

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self._memory.size

    def gather(self, shard: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Start to send the shard, [n, w] and contiguous, to all ranks.

        Returns:
            parts of [t n, w], each with its rows of that: a rank's own first, then those of others as they arrive. A
            part is to be read before the next one is asked for, and all of them are, before the next `gather`.
        """
        pieces = self._pieces(shard, GATHERED)
        first = [self._send_to_all(shard, piece) for piece in pieces[: len(GATHERED)]]
        return self._arrivals(shard, pieces, first)

    def _arrivals(
        self, shard: Tensor, pieces: list[Piece], sent: list[Callable[[], None]]
    ) -> Iterator[tuple[slice, Tensor]]:
        for index, piece in enumerate(pieces):
            yield self._rows(self._memory.rank, shard, piece), shard[piece.rows]
            for other in self._others:
                with self._arrived(shard[piece.rows], other, piece.slot) as part:
                    yield self._rows(other, shard, piece), part
            sent += [self._send_to_all(shard, later) for later in pieces[index + len(GATHERED) :][:1]]
        for wait in sent:
            wait()  # until then the shard is read

    def scatter(
        self, produce: Callable[[slice, Tensor], object], sums: Tensor, meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Sum up what all ranks produce, each its own shard; two summands as they are, more of them in fp32.

        Args:
            produce: writes a rank's summand for these rows of [t n, w].
            sums: this rank's shard of the sum, [n, w] and contiguous, is written here.
            meanwhile: called while pieces are on their way, before anything is waited for.
        """
        pieces, sent = self._pieces(sums, SCATTERED), []

        def produce_and_send(piece: Piece) -> None:
            for other in self._others:
                part = torch.empty_like(sums[piece.rows])
                produce(self._rows(other, sums, piece), part)
                wait = self._memory.beside(partial(self._send, part, other, piece.slot))
                sent.append((wait, part))  # which is read until then
            produce(self._rows(self._memory.rank, sums, piece), sums[piece.rows])

        for piece in pieces[: len(SCATTERED)]:
            produce_and_send(piece)
        if meanwhile is not None:
            meanwhile()
        for index, piece in enumerate(pieces):
            self._add(sums, piece)
            for later in pieces[index + len(SCATTERED) :][:1]:
                produce_and_send(later)
        for wait, _ in sent:
            wait()

    def _add(self, sums: Tensor, piece: Piece) -> None:
        """Add the pieces of the other ranks."""
        own = sums[piece.rows]
        total = own if len(self._others) == 1 else own.to(torch.promote_types(own.dtype, torch.float32))
        for other in self._others:
            with self._arrived(own, other, piece.slot) as part:
                total += part
        if total is not own:
            own.copy_(total)

    def _pieces(self, shard: Tensor, kind: tuple[int, int]) -> list[Piece]:
        """Cut a shard; all ranks cut theirs alike, and take the same slots in turn."""
        row_bytes = shard.shape[1] * shard.element_size()
        step = self._memory.num_bytes // max(row_bytes, 1)
        if step == 0:
            raise ValueError(f"a row of {row_bytes} bytes is longer than a piece, {self._memory.num_bytes} bytes")
        starts = range(0, shard.shape[0], step)
        return [Piece(slice(start, min(start + step, shard.shape[0])), next(self._slots[kind])) for start in starts]

    @staticmethod
    def _rows(rank: int, shard: Tensor, piece: Piece) -> slice:
        """Rows of the whole that a piece of a rank's shard is."""
        before = rank * shard.shape[0]
        return slice(before + piece.rows.start, before + piece.rows.stop)

    def _send_to_all(self, shard: Tensor, piece: Piece) -> Callable[[], None]:
        def send() -> None:
            for other in self._others:
                self._send(shard[piece.rows], other, piece.slot)

        return self._memory.beside(send)

    def _send(self, part: Tensor, other: int, slot: int) -> None:
        memory = self._memory
        memory.take(other, FREE, slot)
        memory.room(other, memory.rank, slot)[: part.nbytes].copy_(part.detach().view(-1).view(torch.uint8))
        memory.tell(other, FULL, slot)

    @contextmanager
    def _arrived(self, like: Tensor, other: int, slot: int) -> Iterator[Tensor]:
        memory = self._memory
        memory.take(other, FULL, slot)
        yield memory.room(memory.rank, other, slot)[: like.nbytes].view(like.dtype).view(like.shape)
        memory.tell(other, FREE, slot)
