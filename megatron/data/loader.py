"""Batches of one rank, prepared by worker processes while the model computes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron.config.errors import UserError
from megatron.data.batch import Batch, BatchOptions, make_batch
from megatron.data.gpt_dataset import SampleDataset
from megatron.data.sampler import RankSampler

PREFETCHED_PER_WORKER = 4


@dataclass(frozen=True)
class _Refusal:
    """A user's error on its way from a worker: raised here, it keeps its sentence and loses the worker's traceback."""

    error: UserError


class _BatchSource(Dataset[Batch]):
    """Makes whole micro-batches: torch hands the sampler's numbers to `__getitems__`."""

    def __init__(self, dataset: SampleDataset, options: BatchOptions) -> None:
        self._dataset = dataset
        self._options = options

    def __getitem__(self, i: int) -> Batch:
        return make_batch([self._dataset[i]], self._options)

    def __getitems__(self, numbers: Sequence[int]) -> Batch | _Refusal:
        try:
            return make_batch([self._dataset[i] for i in numbers], self._options)
        except UserError as error:
            return _Refusal(error)


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_rank(_: int) -> None:
    """Let a signal to the whole process group reach the rank alone, which then saves and ends its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    dataset: SampleDataset,
    *,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    consumed_samples: int = 0,
    num_workers: int = 0,
    options: BatchOptions | None = None,
) -> Iterator[Batch]:
    """Give the micro-batches of a rank, without end, from the sample after the consumed ones on.

    Args:
        dataset: read in order; after its last sample the first follows.
        micro_batch_size: samples of a micro-batch.
        data_rank: this rank among the data-parallel ranks.
        data_size: number of data-parallel ranks.
        consumed_samples: samples that all ranks together took before.
        num_workers: processes that prepare batches ahead; 0: they are made when asked for, in this process.
        options: how samples become batches.

    Raises:
        UserError: while iterating, as the dataset raised it in a worker.
    """
    sampler = RankSampler(
        len(dataset),
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        consumed_samples=consumed_samples,
    )
    loader: DataLoader[Batch] = DataLoader(
        _BatchSource(dataset, options or BatchOptions()),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_unchanged,
        # torch draws a seed for the workers: from a generator of its own, or a resumed run would draw other dropout.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCHED_PER_WORKER if num_workers > 0 else None,
        worker_init_fn=_leave_signals_to_the_rank,
    )
    return _batches(loader)


def _batches(loader: DataLoader[Batch]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, _Refusal):
            raise batch.error
        yield batch
