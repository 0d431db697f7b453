"""Where the entries of a flat range of a shard lie in the logical tensor: rectangles, so that copies are strided.

A tensor divided along `dim` is looked at as a matrix: the dimensions before `dim` are its rows, `dim` and those after
it its columns. A shard holds some intervals of the columns, of every row. A flat range of a shard is a part of a row,
whole rows, and a part of a row; each crossed with the intervals is a rectangle of the logical matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from megatron.parallel.sharding import Sharding, pieces_of


@dataclass(frozen=True)
class Rectangle:
    """Entries `[row, row + rows) x [column, column + columns)` of the logical matrix, and where a flat range has them.

    The first is entry `offset` of the range, and from one row to the next it is `stride` entries.
    """

    row: int
    rows: int
    column: int
    columns: int
    offset: int
    stride: int

    @property
    def numel(self) -> int:
        """Count the entries."""
        return self.rows * self.columns

    def of(self, flat: Tensor) -> Tensor:
        """View these entries of the flat range, `[rows, columns]`."""
        return flat.as_strided(
            (self.rows, self.columns), (self.stride, 1), flat.storage_offset() + self.offset * flat.stride(0)
        )


def is_whole(sharding: Sharding) -> bool:
    """Whether each rank holds the whole tensor."""
    return sharding.dim is None or sharding.num_shards == 1


def normalized(sharding: Sharding) -> Sharding:
    """Say in one way that a tensor is whole: as the only shard."""
    return replace(sharding, num_shards=1, rank=0) if is_whole(sharding) else sharding


@lru_cache(maxsize=4096)
def shard_shape(sharding: Sharding) -> tuple[int, ...]:
    """Shape of this rank's shard."""
    dim = sharding.dim
    if dim is None or sharding.num_shards == 1:
        return sharding.logical_shape
    length = sum(length for _, length in pieces_of(sharding, dim, sharding.rank))
    return (*sharding.logical_shape[:dim], length, *sharding.logical_shape[dim + 1 :])


def shard_numel(sharding: Sharding) -> int:
    """Count the entries of this rank's shard."""
    return math.prod(shard_shape(sharding))


@lru_cache(maxsize=4096)
def rectangles(sharding: Sharding, dim: int, start: int, length: int) -> tuple[Rectangle, ...]:
    """Divide the entries `[start, start + length)` of a row-major shard into rectangles of the logical matrix.

    Args:
        sharding: of the tensor, for this shard.
        dim: the dimension at which the tensor becomes a matrix; the one that is divided, if one is.
        start: first entry of the range.
        length: number of entries.
    """
    inner = math.prod(sharding.logical_shape[dim + 1 :])
    if is_whole(sharding):
        pieces = [(0, math.prod(sharding.logical_shape[dim:]))]
    else:
        pieces = [(first * inner, size * inner) for first, size in pieces_of(sharding, dim, sharding.rank)]
    width = sum(size for _, size in pieces)
    found = []
    for row, rows, low, high in _row_parts(start, start + length, width):
        place = 0  # of the piece within a row of the shard
        for column, size in pieces:
            first, last = max(low, place), min(high, place + size)
            if first < last:
                offset = row * width + first - start
                found.append(Rectangle(row, rows, column + first - place, last - first, offset, width))
            place += size
    return tuple(found)


def without_padding(found: tuple[Rectangle, ...], sharding: Sharding, dim: int) -> tuple[Rectangle, ...]:
    """Leave out the columns of entries that hold nothing."""
    end = math.prod(sharding.logical_shape[dim:]) - sharding.padding * math.prod(sharding.logical_shape[dim + 1 :])
    return tuple(
        _part(one, one.row, one.rows, one.column, min(one.columns, end - one.column))
        for one in found
        if one.column < end
    )


def overlaps(mine: tuple[Rectangle, ...], theirs: tuple[Rectangle, ...]) -> Iterator[tuple[Rectangle, Rectangle]]:
    """Give what two flat ranges have in common, rectangle by rectangle, each as the one and as the other has it."""
    for one in mine:
        for other in theirs:
            row, column = max(one.row, other.row), max(one.column, other.column)
            rows = min(one.row + one.rows, other.row + other.rows) - row
            columns = min(one.column + one.columns, other.column + other.columns) - column
            if rows > 0 and columns > 0:
                yield _part(one, row, rows, column, columns), _part(other, row, rows, column, columns)


def _part(whole: Rectangle, row: int, rows: int, column: int, columns: int) -> Rectangle:
    offset = whole.offset + (row - whole.row) * whole.stride + column - whole.column
    return Rectangle(row, rows, column, columns, offset, whole.stride)


def _row_parts(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Divide a flat range of a matrix into blocks of rows: first row, number of rows, first column, last column."""
    if start >= stop:
        return
    row, low = divmod(start, width)
    last, high = divmod(stop, width)
    if row == last:
        yield row, 1, low, high
        return
    if low:
        yield row, 1, low, width
        row += 1
    if row < last:
        yield row, last - row, 0, width
    if high:
        yield last, 1, 0, high
