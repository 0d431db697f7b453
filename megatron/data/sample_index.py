"""Which tokens make which sample: the document, sample and shuffle indices of a GPT dataset.

The documents of a split are repeated for as many epochs as the samples need, shuffled, and laid in one long row; sample
k of the row holds its tokens [k * seq_length, (k + 1) * seq_length], so that each ends with the token the next begins
with; samples are then shuffled too. Order and random numbers are those of Megatron-LM (`core/datasets/gpt_dataset.py`):
the same files, split, sequence length, number of samples and seed give the same samples in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SEPARATE_BELOW = 0.80
"""Share of an epoch: when the last epoch is needed for less than this, it is shuffled apart, so that the samples that
are left over at the end are all of the last epoch, and each document is seen equally often before it."""

POSITIONS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """How often the documents are repeated, and how many samples come before the last repetition."""

    num_epochs: int
    separate_last: bool
    samples_before_last: int


def plan_epochs(tokens_per_epoch: int, seq_length: int, num_samples: int) -> Epochs:
    """Count the epochs that `num_samples` samples of `seq_length` tokens (and one more at the end) need.

    Raises:
        ValueError: an epoch has no tokens.
    """
    if tokens_per_epoch < 1:
        raise ValueError("an epoch without tokens makes no samples")
    needed = num_samples * seq_length + 1
    num_epochs = max(1, -(-needed // tokens_per_epoch))
    if num_epochs == 1:
        return Epochs(num_epochs=1, separate_last=False, samples_before_last=0)
    before_last = ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length
    samples_per_epoch = (tokens_per_epoch - 1) // seq_length
    separate = num_samples - before_last < int(SEPARATE_BELOW * samples_per_epoch)
    return Epochs(num_epochs=num_epochs, separate_last=separate, samples_before_last=before_last)


def build_document_index(
    documents: npt.NDArray[np.int32], epochs: Epochs, random: np.random.RandomState
) -> npt.NDArray[np.int32]:
    """Repeat and shuffle the documents: int32 [epochs * documents], the row's documents in order."""
    if not epochs.separate_last:
        row = np.tile(documents, epochs.num_epochs)
        random.shuffle(row)
        return row
    first, last = np.tile(documents, epochs.num_epochs - 1), documents.copy()
    random.shuffle(first)
    random.shuffle(last)
    return np.concatenate((first, last))


def build_sample_index(
    sizes: npt.NDArray[np.int32], document_index: npt.NDArray[np.int32], seq_length: int
) -> npt.NDArray[np.integer]:
    """Find where each sample of the row begins.

    Args:
        sizes: [sequences], tokens of each document of the file.
        document_index: [row], the row's documents in order.
        seq_length: tokens of a sample, less the one it shares with the next.

    Returns:
        [samples + 1, 2], int32 where it suffices and else int64: position in `document_index`, and offset in that
        document, of each sample's first token; the last line is where the last sample's last token lies. Tokens at
        the row's end that fill no sample are dropped.
    """
    ends = np.cumsum(sizes[document_index], dtype=np.int64)
    num_samples = (int(ends[-1]) - 1) // seq_length
    dtype = np.int32 if len(document_index) <= np.iinfo(np.int32).max else np.int64
    index = np.zeros((num_samples + 1, 2), dtype)
    # The first line is (0, 0) even when the first document is empty, as in Megatron-LM.
    for first in range(1, num_samples + 1, POSITIONS_AT_ONCE):
        tokens = np.arange(first, min(first + POSITIONS_AT_ONCE, num_samples + 1), dtype=np.int64) * seq_length
        places = np.searchsorted(ends, tokens, side="right")
        starts = np.where(places > 0, ends[places - 1], 0)
        index[first : first + len(tokens), 0] = places
        index[first : first + len(tokens), 1] = tokens - starts
    return index


def build_shuffle_index(num_samples: int, first_part: int, random: np.random.RandomState) -> npt.NDArray[np.integer]:
    """Shuffle [0, first_part) and [first_part, num_samples) apart: which sample of the row is the i-th."""
    dtype = np.dtype(np.int64 if num_samples >= np.iinfo(np.uint32).max - 1 else np.uint32)
    order: npt.NDArray[np.integer] = np.arange(num_samples, dtype=dtype)
    random.shuffle(order[:first_part])
    if first_part < num_samples:
        random.shuffle(order[first_part:])
    return order


def build_indices(
    sizes: npt.NDArray[np.int32], documents: range, *, seq_length: int, num_samples: int, seed: int
) -> dict[str, npt.NDArray[np.integer]]:
    """Build the three indices of `num_samples` samples, or more where the last epoch has them.

    Args:
        sizes: [sequences], tokens of each document of the file.
        documents: the split's documents.
        seq_length: tokens of a sample, less the one it shares with the next.
        num_samples: samples that will be asked for.
        seed: of the document and sample order.

    Returns:
        `documents` (see `build_document_index`), `samples` (`build_sample_index`) and `shuffle`
        (`build_shuffle_index`).

    Raises:
        ValueError: the documents hold no tokens.
    """
    sizes = np.array(sizes[documents.start : documents.stop])  # aligned and in memory, unlike the mapped file
    epochs = plan_epochs(int(sizes.sum(dtype=np.int64)), seq_length, num_samples)
    random = np.random.RandomState(seed)
    row = build_document_index(np.arange(documents.start, documents.stop, dtype=np.int32), epochs, random)
    samples = build_sample_index(sizes, row - np.int32(documents.start), seq_length)
    count = len(samples) - 1
    shuffle = build_shuffle_index(count, epochs.samples_before_last if epochs.separate_last else count, random)
    return {"documents": row, "samples": samples, "shuffle": shuffle}
