"""Which samples a rank takes, as a pure function of what was consumed before."""

from __future__ import annotations

from collections.abc import Iterator


class RankSampler:
    """The sample numbers of each micro-batch of one data-parallel rank, without end.

    All ranks together take the samples in order: micro-batch k of rank r takes `micro_batch_size` of them from
    `consumed_samples + (k * data_size + r) * micro_batch_size` on, and after the last sample the first follows. So what
    was consumed is one number that does not depend on how many ranks consumed it: a run that goes on with another
    data-parallel size neither skips a sample nor repeats one.

    Args:
        num_samples: length of the dataset.
        micro_batch_size: samples of a micro-batch.
        data_rank: this rank among the data-parallel ranks.
        data_size: number of data-parallel ranks.
        consumed_samples: samples that all ranks together took before.

    Raises:
        ValueError: the dataset is empty, or the rank is not below the size.
    """

    def __init__(
        self, num_samples: int, *, micro_batch_size: int, data_rank: int, data_size: int, consumed_samples: int = 0
    ) -> None:
        if num_samples < 1 or not 0 <= data_rank < data_size:
            raise ValueError(f"rank {data_rank} of {data_size} cannot take samples of {num_samples}")
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.data_size = data_size
        self.first = consumed_samples + data_rank * micro_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Give the sample numbers of micro-batch 0, 1, 2, ..."""
        first = self.first
        while True:
            yield [sample % self.num_samples for sample in range(first, first + self.micro_batch_size)]
            first += self.micro_batch_size * self.data_size
