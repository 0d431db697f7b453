"""Products computed in pieces, while the pieces that they need or make travel.

The idea is that of Wang et al. 2023, "Overlap communication with dependent computation via decomposition" (ASPLOS).
With sequence parallelism a column-parallel product needs the rows of all ranks, and a row-parallel one makes a summand
for the rows of each. On two ranks, "own" being this rank's rows and "other" those of its neighbour:

    all-gather, then product                     product, then reduce-scatter

    sent     |own 1|own 2|                       sent           |other 1|other 2|
    product  |  own   |other 1|other 2|          product  |other 1|other 2|  own   |+|+|

On t ranks "other" is each of the t - 1 others in turn. Every piece goes straight to the rank that needs it, so that the
links carry what a collective would send. More pieces than the transport has slots are taken in rounds: the others' rows
of a round, and this rank's.

Every row is computed by one product, whatever the number of pieces; sums over ranks are added in a fixed order, of a
rank and those before it, and rounded after each addition, as a ring of NCCL does.

Legend: n rows of a rank's shard, t ranks, i input and o output features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from megatron.parallel.transport import Swap, Transport, cut_rows

Product = Callable[[Tensor, Tensor], object]
"""Computes the output rows of some input rows, into its second argument."""


class Gathering:
    """The rows of all ranks, under way to one tensor."""

    def __init__(self, whole: Tensor, swaps: Sequence[Swap]) -> None:
        self._whole, self._swaps = whole, swaps

    def wait(self) -> Tensor:
        """Return all rows [t n, i]."""
        for swap in self._swaps:
            swap.wait()
        return self._whole


class Scattering:
    """The rows of this rank in a sum over ranks, of which some summands are under way."""

    def __init__(self, output: Tensor) -> None:
        self._output = output
        self._arriving: deque[tuple[Swap, slice]] = deque()

    def expect(self, swap: Swap, rows: slice) -> None:
        """Take note of a summand of some rows that is on its way."""
        self._arriving.append((swap, rows))

    def make_room(self, most: int) -> None:
        """Add what came first until less than `most` summands are under way."""
        while len(self._arriving) >= most:
            swap, rows = self._arriving.popleft()
            self._output[rows] += swap.wait()
            swap.done()

    def wait(self) -> Tensor:
        """Return the sum [n, o]."""
        self.make_room(1)
        return self._output


def start_gathering(shard: Tensor, transport: Transport) -> Gathering:
    """Start to bring the rows of all ranks together, in their order."""
    whole = _empty_whole(shard, transport)
    swaps = [_bring(piece, distance, shard, whole, transport) for piece, distance in _steps(shard, transport)]
    return Gathering(whole, swaps)


def gathered_product(
    shard: Tensor, features: int, product: Product, transport: Transport, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Multiply the rows of all ranks.

    Args:
        shard: this rank's rows, [n, i], contiguous.
        features: o.
        product: of rows [m, i], into [m, o].
        transport: among the ranks.
        keep: whether the gathered rows are wanted too.

    Returns:
        [t n, o], and the gathered rows [t n, i] or None.
    """
    group = transport.group
    whole = _empty_whole(shard, transport) if keep else None
    output = shard.new_empty(group.size * shard.shape[0], features)
    steps = deque(_steps(shard, transport))
    under_way: deque[Swap] = deque()

    def start(count: int) -> None:
        for _ in range(min(count, len(steps))):
            under_way.append(_bring(*steps.popleft(), shard, whole, transport))

    start(transport.slots * (group.size - 1))
    for pieces in _rounds(shard, transport):
        own = slice(pieces[0].start, pieces[-1].stop)
        product(shard[own], _chunk(output, group.rank, group.size)[own])
        for piece in pieces:
            for distance in range(1, group.size):
                swap = under_way.popleft()
                source = (group.rank - distance) % group.size
                product(swap.wait(), _chunk(output, source, group.size)[piece])
                swap.done()
                start(1)
    return output, whole


def start_scattered_product(rows: Tensor, features: int, product: Product, transport: Transport) -> Scattering:
    """Multiply rows and start to sum the result over the ranks, each of which gets its shard of the sum.

    Args:
        rows: [t n, i], contiguous.
        features: o.
        product: of rows [m, i], into [m, o]; all of them have been asked for when this returns.
        transport: among the ranks.
    """
    group = transport.group
    own = _chunk(rows, group.rank, group.size)
    output = rows.new_empty(own.shape[0], features)
    scattering = Scattering(output)
    for pieces in _rounds(output, transport):
        for piece in pieces:
            for distance in range(1, group.size):
                scattering.make_room(transport.slots * (group.size - 1))
                theirs = _chunk(rows, (group.rank + distance) % group.size, group.size)[piece]
                summand = output.new_empty(theirs.shape[0], features)
                product(theirs, summand)
                scattering.expect(transport.swap(summand, distance), piece)
        together = slice(pieces[0].start, pieces[-1].stop)
        product(own[together], output[together])
    return scattering


def _bring(piece: slice, distance: int, shard: Tensor, whole: Tensor | None, transport: Transport) -> Swap:
    """Start to send a piece of this rank's rows and to receive another rank's, into `whole` if there is one."""
    group = transport.group
    source = (group.rank - distance) % group.size
    into = None if whole is None else _chunk(whole, source, group.size)[piece]
    return transport.swap(shard[piece], distance, into)


def _empty_whole(shard: Tensor, transport: Transport) -> Tensor:
    """Make the tensor of all ranks' rows, in which this rank's are on their way."""
    group = transport.group
    whole = shard.new_empty(group.size * shard.shape[0], shard.shape[1])
    transport.place(shard, _chunk(whole, group.rank, group.size))
    return whole


def _chunk(rows: Tensor, rank: int, size: int) -> Tensor:
    """Give a rank's rows."""
    length = rows.shape[0] // size
    return rows[rank * length : (rank + 1) * length]


def _pieces(shard: Tensor, transport: Transport) -> list[slice]:
    return cut_rows(shard.shape[0], shard.shape[1] * shard.element_size(), transport.piece_bytes)


def _steps(shard: Tensor, transport: Transport) -> list[tuple[slice, int]]:
    """List pieces and distances in the order in which they are swapped."""
    distances = range(1, transport.group.size)
    return [(piece, distance) for piece in _pieces(shard, transport) for distance in distances]


def _rounds(shard: Tensor, transport: Transport) -> Iterator[list[slice]]:
    """Cut a shard into pieces, and take as many together as leaves slots for as many that follow."""
    pieces, count = _pieces(shard, transport), max(transport.slots // 2, 1)
    for first in range(0, len(pieces), count):
        yield pieces[first : first + count]
