"""Command lines for the tests of the config floor."""

from __future__ import annotations

MODEL = ("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4")
LEGAL = (*MODEL, "--lr", "1e-3", "--train-iters", "100", "--mock-data", "--vocab-size", "100", "--seq-length", "32")
"""Nothing more is needed for a run."""


def legal(*words: str, without: str = "") -> list[str]:
    """A legal command line with words of its own added; `without` names flags with one value each to leave out."""
    kept = list(LEGAL)
    for name in without.split():
        at = kept.index(name)
        del kept[at : at + (1 if name == "--mock-data" else 2)]
    return [*kept, *words]
