"""Blends: samples of several datasets, interleaved in proportion to weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.gpt_dataset import SampleDataset, cached
from megatron.data.index_cache import Arrays, IndexCache

SURPLUS = 0.005
"""Share of samples a blended dataset is built larger than needed, as in Megatron-LM (it decides its epochs)."""

LANES_TIMES_DATASETS = 1 << 15
SHORTEST_PIECE = 256


@dataclass(frozen=True)
class WeightedPrefix:
    """One data set of a blend, with its share of the samples."""

    prefix: str
    weight: float


def parse_blend(words: Sequence[str], flag: str) -> list[WeightedPrefix]:
    """Read the words of `--data-path` and its like: `a`, `a b` (evenly), or `0.3 a 0.7 b`; weights become shares of 1.

    Raises:
        DataError: weights and prefixes do not alternate, or a weight is not positive.
    """
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        weights, prefixes = [1.0] * len(words), list(words)
    else:
        prefixes = list(words[1::2])
        weights = [number for number in numbers[::2] if number is not None]
        alternate = len(weights) == len(prefixes) == len(words) / 2
        if not alternate or any(number is not None for number in numbers[1::2]):
            raise DataError(
                f"{flag} {' '.join(words)!r} mixes prefixes with and without a weight: give prefixes alone, or a "
                f'weight before each, as "0.3 first 0.7 second" (a file whose name is a number: "./7").'
            )
    for prefix, weight in zip(prefixes, weights, strict=True):
        if not 0 < weight < math.inf:
            raise DataError(
                f"{flag} gives {prefix} the weight {weight:g}: weights are positive; leave it out for none."
            )
    shares = (np.array(weights) / np.sum(weights)).tolist() if weights else []
    return [WeightedPrefix(prefix, share) for prefix, share in zip(prefixes, shares, strict=True)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def samples_to_build(num_samples: int, share: float) -> int:
    """Count the samples of one dataset of a blend, with Megatron-LM's surplus."""
    return math.ceil(math.ceil(num_samples * share) * (1 + SURPLUS))


def build_blend_indices(
    shares: Sequence[float], num_samples: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Choose the dataset of each sample, and which of that dataset's samples it is.

    The order is Megatron-LM's: sample t is of the dataset that is furthest behind, with the largest
    `share * max(t, 1) - samples so far`, the first of equals. So dataset i never has more than
    `ceil(share_i * num_samples)` samples; it may fall a little more than one behind (three sets of 1:1:7 do, by 1.11).

    That rule is sequential. It is computed here for many pieces of the order at once, each from a guess of the counts
    it begins with, and pieces whose guess differs from where the piece before ended are computed again from there,
    until none does: the result is the sequential one, bit for bit. Wrong guesses are rare after the first round, for
    the rule draws counts that differ towards each other.

    Args:
        shares: [datasets], adding up to 1.
        num_samples: samples of the blend.

    Returns:
        dataset of each sample, int32 [num_samples], and its number in it, int64 [num_samples].
    """
    weights = np.asarray(shares, dtype=np.float64)
    lanes = max(1, min(LANES_TIMES_DATASETS // len(weights), num_samples // SHORTEST_PIECE))
    length = -(-num_samples // lanes)
    starts = np.arange(lanes, dtype=np.int64) * length
    begin = _likely_counts(weights, starts)
    end = np.empty_like(begin)
    dataset = np.empty((lanes, length), np.int32)
    number = np.empty((lanes, length), np.int64)
    wrong = np.arange(lanes)
    while len(wrong):
        dataset[wrong], number[wrong], end[wrong] = _follow(weights, starts[wrong], begin[wrong], length)
        wrong = 1 + np.flatnonzero((end[:-1] != begin[1:]).any(axis=1))
        begin[wrong] = end[wrong - 1]
    return dataset.reshape(-1)[:num_samples], number.reshape(-1)[:num_samples]


def _likely_counts(weights: npt.NDArray[np.float64], times: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Round `weights * time` to whole samples that add up to `time`: [times, datasets]."""
    ideal = times[:, None] * weights
    counts = np.floor(ideal)
    missing = times - counts.sum(axis=1).astype(np.int64)
    rank = np.argsort(np.argsort(counts - ideal, axis=1, kind="stable"), axis=1, kind="stable")
    return counts + (rank < missing[:, None])


def _follow(
    weights: npt.NDArray[np.float64], starts: npt.NDArray[np.int64], counts: npt.NDArray[np.float64], length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Apply the sequential rule to pieces of `length` samples side by side: [pieces, length] twice, and last counts."""
    lanes = np.arange(len(starts))
    counts = counts.copy()
    dataset = np.empty((length, len(starts)), np.int32)
    number = np.empty((length, len(starts)), np.int64)
    behind = np.empty_like(counts)
    for step in range(length):
        np.multiply(np.maximum(starts + step, 1.0)[:, None], weights, out=behind)
        behind -= counts
        chosen = behind.argmax(axis=1)
        dataset[step] = chosen
        number[step] = counts[lanes, chosen]
        counts[lanes, chosen] += 1
    return dataset.T, number.T, counts


class BlendedDataset:
    """Several datasets as one.

    Args:
        datasets: each with at least `ceil(share * num_samples)` samples.
        shares: [datasets], adding up to 1.
        num_samples: samples of the blend.
        cache: where the order is kept; computed in memory when None.

    Raises:
        DataError: a dataset has fewer samples than its share.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        shares: Sequence[float],
        *,
        num_samples: int,
        cache: IndexCache | None = None,
    ) -> None:
        self.datasets = list(datasets)
        for dataset, share in zip(datasets, shares, strict=True):
            if len(dataset) < math.ceil(share * num_samples):
                raise DataError(
                    f"a blend of {num_samples} samples takes {math.ceil(share * num_samples)} of a dataset that has "
                    f"{len(dataset)}: {dataset.description}."
                )
        order = {"kind": "BlendedDataset", "version": 1, "shares": list(shares), "num_samples": num_samples}
        self.description: dict[str, Any] = {**order, "datasets": [dataset.description for dataset in datasets]}
        arrays = cached(cache, order, ("dataset", "number"), partial(_order, tuple(shares), num_samples))
        self._dataset, self._number = arrays["dataset"], arrays["number"]

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._dataset)

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        """Sample `i`: int64 [seq_length + 1]."""
        return self.datasets[int(self._dataset[i])][int(self._number[i])]


def _order(shares: tuple[float, ...], num_samples: int) -> Arrays:
    dataset, number = build_blend_indices(shares, num_samples)
    return {"dataset": dataset, "number": number}
