"""Shapes of tiles that were found fastest, as data: `tools/tune_attention.py` measures them anew."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kernel = Literal["forward", "query", "key_value"]


class Tile(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        queries: rows of a tile of queries.
        keys: rows of a tile of keys.
        warps: of a program.
        stages: tiles in flight while one is computed with.
        tma: whether tiles come by Hopper's copy engine.
        registers: the most a thread may use, so that more programs run beside each other; None: up to the compiler.
        apart: whether the gradients of keys and of values are made one after the other: the weights are computed once
            more, and a program holds half as much.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None
    apart: bool = False


HOPPER: dict[tuple[Kernel, int], Tile] = {
    ("forward", 64): Tile(128, 128, 4, 3, tma=True),
    ("forward", 128): Tile(64, 64, 4, 3, tma=True),
    ("forward", 256): Tile(128, 64, 8, 2, tma=True),
    ("query", 64): Tile(128, 64, 8, 4, tma=True),
    ("query", 128): Tile(128, 64, 8, 3, tma=True),
    ("query", 256): Tile(128, 32, 8, 3, tma=True),
    ("key_value", 64): Tile(64, 64, 4, 4, tma=True),
    ("key_value", 128): Tile(64, 128, 8, 3, tma=True),
    ("key_value", 256): Tile(32, 128, 8, 3, tma=True, apart=True),
}
"""Measured on an H200, causal: the same chip as the H100."""

AMPERE: dict[tuple[Kernel, int], Tile] = {
    ("forward", 64): Tile(128, 64, 4, 3),
    ("forward", 128): Tile(128, 32, 4, 2),
    ("forward", 256): Tile(64, 32, 4, 2),
    ("query", 64): Tile(64, 64, 4, 2),
    ("query", 128): Tile(128, 16, 4, 3),
    ("query", 256): Tile(64, 32, 4, 1),
    ("key_value", 64): Tile(32, 64, 4, 3),
    ("key_value", 128): Tile(32, 64, 4, 3),
    ("key_value", 256): Tile(16, 64, 4, 2, apart=True),
}
"""Never timed on such a GPU: the fastest on an H200 that computed with Ampere's matrix instructions and in the 99 KiB
of the smaller chips of the kind, of those that Triton 3.6 and 3.7 keep in the registers of Ampere, all but a few."""

TABLES = {9: HOPPER, 8: AMPERE}
"""By the major compute capability; devices that are not here get the newest table below theirs."""


def find_tile(kernel: Kernel, padded_size: int, capability: int) -> Tile:
    """Look up the shape of tiles for heads of `padded_size` channels; those narrower than 64 take the table's 64."""
    major = max((known for known in TABLES if known <= capability), default=min(TABLES))
    return TABLES[major][kernel, max(padded_size, 64)]
