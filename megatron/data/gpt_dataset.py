"""Samples of a fixed length out of the documents of one file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_cache import Arrays, IndexCache
from megatron.data.indexed import IndexedDataset
from megatron.data.sample_index import build_indices

INDEX_VERSION = 1
"""Raised whenever the same description would give other indices."""
MAX_DOCUMENTS = int(np.iinfo(np.int32).max)


class SampleDataset(Protocol):
    """What training reads: `len()` samples, each int64 [seq_length + 1]; `description` says, as JSON, which."""

    @property
    def description(self) -> dict[str, Any]:
        """Everything that decides what sample `i` is."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]: ...


class GPTDataset:
    """Samples packed from the documents of a range, across document boundaries, shuffled.

    Args:
        indexed: the file.
        documents: range of its sequences.
        seq_length: tokens of a sample; each has one more, the last label.
        num_samples: samples that will be asked for; the dataset has as many or more.
        seed: of the order.
        cache: where the indices are kept; computed in memory when None.

    Raises:
        DataError: the documents are too many, or have fewer than two tokens.
        DataTimeoutError: another process builds the indices for too long.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        *,
        seq_length: int,
        num_samples: int,
        seed: int,
        cache: IndexCache | None = None,
    ) -> None:
        self.indexed = indexed
        self.seq_length = seq_length
        self._check(documents)
        self.description: dict[str, Any] = {
            "kind": "GPTDataset",
            "version": INDEX_VERSION,
            "name": Path(indexed.prefix).name,
            "idx_sha256": indexed.fingerprint.idx_sha256,
            "bin_sample_sha256": indexed.fingerprint.bin_sample_sha256,
            "documents": [documents.start, documents.stop],
            "seq_length": seq_length,
            "num_samples": num_samples,
            "seed": seed,
        }
        build = partial(
            build_indices, indexed.sizes, documents, seq_length=seq_length, num_samples=num_samples, seed=seed
        )
        arrays = cached(cache, self.description, ("documents", "samples", "shuffle"), build)
        self._documents, self._samples, self._shuffle = arrays["documents"], arrays["samples"], arrays["shuffle"]

    def _check(self, documents: range) -> None:
        where = f"documents {documents.start} to {documents.stop} of {self.indexed.prefix}"
        if documents.stop > MAX_DOCUMENTS:
            raise DataError(f"{where} are more than {MAX_DOCUMENTS}: split the file in several and blend them.")
        num_tokens = int(self.indexed.sizes[documents.start : documents.stop].sum(dtype=np.int64))
        if num_tokens < 2:
            raise DataError(
                f"{where} hold {num_tokens} tokens, and a sample needs a token and the one that follows it: "
                f"give this set more documents (--split) or another file."
            )

    def __len__(self) -> int:
        """Count the samples: at least `num_samples`."""
        return len(self._shuffle)

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        """Sample `i` of the shuffled order: int64 [seq_length + 1].

        Raises:
            IndexError: there is no such sample.
        """
        row = int(self._shuffle[i])
        (first, first_offset), (last, last_offset) = self._samples[row].tolist(), self._samples[row + 1].tolist()
        if first == last:
            length = last_offset - first_offset + 1
            return self.indexed.get(int(self._documents[first]), first_offset, length).astype(np.int64)
        parts = [self.indexed.get(int(self._documents[first]), first_offset)]
        parts += [self.indexed.get(document) for document in self._documents[first + 1 : last].tolist()]
        parts.append(self.indexed.get(int(self._documents[last]), 0, last_offset + 1))
        return np.concatenate(parts, dtype=np.int64)


def cached(
    cache: IndexCache | None, description: dict[str, Any], names: tuple[str, ...], build: Callable[[], Arrays]
) -> Arrays:
    """Compute arrays, or take them from the cache where there is one."""
    return build() if cache is None else cache.load_or_build(description, names, build)
