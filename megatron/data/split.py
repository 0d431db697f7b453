"""Which documents of a file are for training, validation and test."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np

from megatron.data.errors import DataError

SPLIT_NAMES = ("train", "valid", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """Read `--split` ("969,30,1"): up to three shares, of any sum; returns them normalised to 1.

    Raises:
        DataError: it is not up to three numbers that are not negative and not all zero.
    """
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    shares += [0.0] * (len(SPLIT_NAMES) - len(shares))
    if len(shares) > len(SPLIT_NAMES) or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        raise DataError(
            f"--split {split!r} is not up to three shares (train, validation, test) that are not negative and not all "
            f'zero: write it as "969,30,1".'
        )
    train, valid, test = (np.array(shares) / np.sum(shares)).tolist()
    return train, valid, test


def split_documents(shares: tuple[float, float, float], num_documents: int) -> tuple[range, range, range]:
    """Give each share its range of documents, in order, with Megatron-LM's rounding of the cumulated shares."""
    bounds = [round(bound * float(num_documents)) for bound in accumulate(shares, initial=0)]
    # The last bound may round past the end only through the cumulated shares' last bit; documents end at the end.
    first, second, third, last = (min(bound, num_documents) for bound in bounds)
    return range(first, second), range(second, third), range(third, last)


def require_documents(documents: range, share: float, *, name: str, prefix: str, num_documents: int) -> None:
    """Refuse a share that got no document.

    Raises:
        DataError: naming the data set, its documents and the share.
    """
    if len(documents) == 0:
        raise DataError(
            f"the {name} set gets none of the {num_documents} documents of {prefix} with a share of {share:.4g}: give "
            f"it a larger share in --split, a data set of its own (--{name}-data-path), or no samples to draw."
        )
