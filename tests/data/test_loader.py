import os
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.batch import BatchOptions
from megatron.data.errors import DataError
from megatron.data.loader import build_loader
from megatron.data.sampler import RankSampler


class Numbers:
    """Sample i holds i, so that a batch says which samples it is of."""

    def __init__(self, num_samples, bad=()):
        self.num_samples, self.bad = num_samples, bad
        self.description = {}

    def __len__(self):
        return self.num_samples

    def __getitem__(self, i):
        if i in self.bad:
            raise DataError(f"sample {i} of text.bin is unreadable: copy the file anew.")
        return np.full(3, i)


def taken(loader, count):
    return [batch.tokens[:, 0].tolist() for batch in islice(loader, count)]


PHASE = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6))


@settings(max_examples=200, deadline=None)
@given(st.lists(PHASE, min_size=1, max_size=5), st.integers(1, 60))
def test_changing_the_data_parallel_size_neither_skips_nor_repeats_a_sample(phases, num_samples):
    consumed, seen = 0, []
    for data_size, micro_batch_size, micro_batches in phases:
        ranks = [
            islice(
                RankSampler(
                    num_samples,
                    micro_batch_size=micro_batch_size,
                    data_rank=rank,
                    data_size=data_size,
                    consumed_samples=consumed,
                ),
                micro_batches,
            )
            for rank in range(data_size)
        ]
        for step in zip(*ranks, strict=True):
            seen += [sample for numbers in step for sample in numbers]
        consumed += data_size * micro_batch_size * micro_batches
    assert seen == [sample % num_samples for sample in range(consumed)]


def test_micro_batches_are_laid_out_rank_by_rank():
    loader = build_loader(Numbers(100), micro_batch_size=2, data_rank=1, data_size=3, consumed_samples=12)
    assert taken(loader, 3) == [[14, 15], [20, 21], [26, 27]]


def test_after_the_last_sample_the_first_follows():
    loader = build_loader(Numbers(5), micro_batch_size=2, data_rank=0, data_size=1)
    assert taken(loader, 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_what_the_process_itself_would(num_workers):
    def numbers(workers):
        loader = build_loader(
            Numbers(50), micro_batch_size=3, data_rank=1, data_size=2, consumed_samples=6, num_workers=workers
        )
        return taken(loader, 12)

    assert numbers(num_workers) == numbers(0)


@pytest.mark.parametrize("dense_mask", [False, True])
def test_every_field_of_a_batch_comes_back_from_a_worker(dense_mask):
    options = BatchOptions(
        eod_id=4, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True, dense_mask=dense_mask
    )

    def first(workers):
        loader = build_loader(
            Numbers(50), micro_batch_size=8, data_rank=0, data_size=1, num_workers=workers, options=options
        )
        return vars(next(loader))

    for (name, made), received in zip(first(0).items(), first(1).values(), strict=True):
        if made is None:
            assert received is None, name
        else:
            torch.testing.assert_close(received, made, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_keeps_its_sentence(num_workers):
    loader = build_loader(Numbers(50, bad=[5]), micro_batch_size=2, data_rank=0, data_size=1, num_workers=num_workers)
    assert taken(loader, 2) == [[0, 1], [2, 3]]
    with pytest.raises(DataError) as refusal:
        next(loader)
    assert str(refusal.value) == "sample 5 of text.bin is unreadable: copy the file anew."


def test_loading_draws_nothing_from_the_runs_random_numbers():
    before = torch.get_rng_state()
    loader = build_loader(Numbers(9), micro_batch_size=1, data_rank=0, data_size=1, num_workers=1)
    taken(loader, 2)
    assert torch.equal(torch.get_rng_state(), before)


class Processes(Numbers):
    def __getitem__(self, i):
        return np.full(3, os.getpid())


def test_workers_survive_the_signal_that_asks_the_rank_to_stop():
    loader = build_loader(Processes(50), micro_batch_size=1, data_rank=0, data_size=1, num_workers=1)
    [[worker]] = taken(loader, 1)
    assert worker != os.getpid()
    os.kill(worker, signal.SIGTERM)
    assert taken(loader, 20) == [[worker]] * 20


def test_ids_outside_the_vocabulary_stop_the_loader():
    loader = build_loader(Numbers(50), micro_batch_size=2, data_rank=0, data_size=1, options=BatchOptions(vocab_size=3))
    assert taken(loader, 1) == [[0, 1]]
    with pytest.raises(DataError, match="token id 3"):
        next(loader)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="samples of 0"):
        build_loader(Numbers(0), micro_batch_size=1, data_rank=0, data_size=1)
