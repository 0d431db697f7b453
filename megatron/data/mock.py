"""Synthetic samples that need no file and can be learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

NOISE = 0.1
"""Share of tokens that are random: a model that has learned the rest predicts nine of ten tokens, less pairs."""


class MockDataset:
    """Each token is followed by the same other token, in a cycle through the vocabulary, but for one in ten.

    Sample `i` is a pure function of `seed` and `i`; the cycle is one of `seed` alone, so that it can be learned.

    Args:
        vocab_size: tokens are in [0, vocab_size).
        seq_length: tokens of a sample; each has one more, the last label.
        num_samples: length of the dataset.
        seed: of everything.
        stream: sets of the same seed and different streams share the cycle and no sample (0 train, 1 valid, 2 test).
    """

    def __init__(self, *, vocab_size: int, seq_length: int, num_samples: int, seed: int, stream: int = 0) -> None:
        self.description: dict[str, Any] = {
            "kind": "MockDataset",
            "vocab_size": vocab_size,
            "seq_length": seq_length,
            "num_samples": num_samples,
            "seed": seed,
            "stream": stream,
        }
        self._num_samples = num_samples
        self._seq_length = seq_length
        self._key = (seed, stream)
        self._cycle = np.random.default_rng(seed).permutation(vocab_size)

    def __len__(self) -> int:
        """Count the samples."""
        return self._num_samples

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        """Sample `i`: int64 [seq_length + 1].

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= i < self._num_samples:
            raise IndexError(f"sample {i} of {self._num_samples}")
        random = np.random.default_rng((*self._key, i))
        vocab_size, length = len(self._cycle), self._seq_length + 1
        tokens = self._cycle[(random.integers(vocab_size) + np.arange(length)) % vocab_size]
        noisy = random.random(length) < NOISE
        tokens[noisy] = random.integers(vocab_size, size=int(noisy.sum()))
        return tokens
