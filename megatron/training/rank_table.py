"""Which rank is where: a table for the start of a run, and a warning where the layout sends much over the network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron.parallel.mesh import AXES, Mesh

MOST_ROWS = 16
"""More ranks than this are told host by host, more hosts by the first and the last."""


class Seat(NamedTuple):
    """Where a rank runs: its host and its device there."""

    host: str
    device: str


def describe_ranks(mesh: Mesh, seats: Sequence[Seat]) -> list[str]:
    """Give the lines of the rank table, and a warning for a tensor group that spans hosts; none for a single rank.

    Args:
        mesh: the layout.
        seats: of each rank, in order of rank.
    """
    if mesh.world_size == 1:
        return []
    blocks = [(rank, rank) for rank in range(mesh.world_size)]
    if mesh.world_size > MOST_ROWS:
        blocks = list(_blocks_of_one_host(seats))
    rows = [("rank", "host", "device", *AXES), *(_row(mesh, seats, first, last) for first, last in blocks)]
    if len(blocks) > MOST_ROWS:
        left_out = len(blocks) - MOST_ROWS
        rows[MOST_ROWS:-1] = [(f"... {left_out} more rows", *[""] * (2 + len(AXES)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f" {line}" for line in lines] + list(_warn_of_spanning(mesh, seats))


def _blocks_of_one_host(seats: Sequence[Seat]) -> Iterator[tuple[int, int]]:
    """First and last of the ranks that follow one another on a host."""
    for _, block in itertools.groupby(range(len(seats)), key=lambda rank: seats[rank].host):
        ranks = list(block)
        yield ranks[0], ranks[-1]


def _row(mesh: Mesh, seats: Sequence[Seat], first: int, last: int) -> tuple[str, ...]:
    ranks = range(first, last + 1)
    devices = list(dict.fromkeys(seats[rank].device for rank in ranks))
    device = devices[0] if len(devices) == 1 else f"{devices[0]} .. {devices[-1]}"
    coordinates = [mesh.coordinates(rank) for rank in ranks]
    return (
        _range(ranks),
        seats[first].host,
        device,
        *(_range(values) for values in zip(*coordinates, strict=True)),
    )


def _range(values: Sequence[int]) -> str:
    """Write the least and the greatest; what a row holds of an axis has no gaps, since ranks are numbered along it."""
    least, greatest = min(values), max(values)
    return str(least) if least == greatest else f"{least}-{greatest}"


def _warn_of_spanning(mesh: Mesh, seats: Sequence[Seat]) -> Iterator[str]:
    spanning = [line for line in mesh.lines("tensor") if len({seats[rank].host for rank in line}) > 1]
    if not spanning:
        return
    line = spanning[0]
    hosts = list(dict.fromkeys(seats[rank].host for rank in line))
    names = ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else "")
    yield (
        f" warning: {len(spanning)} of {mesh.world_size // mesh.tensor} tensor groups span hosts (ranks {_range(line)} "
        f"are on {names}): every layer then waits for the network; lower --tensor-model-parallel-size to a divisor of "
        "the ranks of a host, or number the ranks host by host"
    )
