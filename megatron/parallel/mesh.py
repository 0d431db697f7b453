"""Rank arithmetic: the mesh (pipeline, data, Ulysses, tensor) in pure integers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Axis = Literal["pipeline", "data", "ulysses", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)


class Coordinates(NamedTuple):
    """Where a rank sits on each axis."""

    pipeline: int
    data: int
    ulysses: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """Ranks as a grid, numbered with the tensor axis fastest and the pipeline axis slowest.

    Tensor ranks exchange the most and are neighbours, so that they share a node; pipeline stages exchange the least
    and lie furthest apart. Data and Ulysses are adjacent, so that the ranks between which gradients are summed
    (`lines("data", "ulysses")`) are one strided range.

    Raises:
        ValueError: a size is below one.
    """

    pipeline: int = 1
    data: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in zip(AXES, self.sizes, strict=True):
            if size < 1:
                raise ValueError(f"the mesh has {axis}={size}: every axis needs at least one rank")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Number of ranks on each axis, in the order of `AXES`."""
        return self.pipeline, self.data, self.ulysses, self.tensor

    @property
    def world_size(self) -> int:
        """Number of ranks in the whole mesh."""
        return math.prod(self.sizes)

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` sits on each axis.

        Raises:
            ValueError: the mesh has no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.world_size} ranks")
        rest, tensor = divmod(rank, self.tensor)
        rest, ulysses = divmod(rest, self.ulysses)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline, data, ulysses, tensor)

    def rank_at(self, coordinates: Coordinates) -> int:
        """Return the rank at `coordinates`; the inverse of `coordinates(rank)`."""
        rank = 0
        for coordinate, size in zip(coordinates, self.sizes, strict=True):
            rank = rank * size + coordinate
        return rank

    def lines(self, *axes: Axis) -> list[tuple[int, ...]]:
        """Every set of ranks that differ in their coordinates on `axes` only; each rank is in exactly one.

        Args:
            axes: one axis gives its lines; several give planes, e.g. `lines("data", "ulysses")`.

        Returns:
            ascending ranks, ordered by their first rank: the same list on every rank.
        """
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank, coordinates in enumerate(itertools.product(*map(range, self.sizes))):
            fixed = tuple(c for axis, c in zip(AXES, coordinates, strict=True) if axis not in axes)
            lines.setdefault(fixed, []).append(rank)
        return [tuple(line) for line in lines.values()]

    def ranks_of(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """Return the line along `axis` that `rank` is on, itself included, ascending."""
        here = self.coordinates(rank)
        return tuple(self.rank_at(here._replace(**{axis: index})) for index in range(getattr(self, axis)))
