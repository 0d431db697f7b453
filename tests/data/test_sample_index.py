"""The indices equal those of a loop written straight from Megatron-LM's definition of them."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron.data.gpt_dataset import GPTDataset
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.sample_index import build_indices, plan_epochs


def reference_indices(sizes, documents, seq_length, num_samples, seed):
    """One document and one sample at a time: count epochs, shuffle, walk along the row."""
    per_epoch = sum(sizes[d] for d in documents)
    epochs = 1
    while epochs * per_epoch < num_samples * seq_length + 1:
        epochs += 1
    before_last, apart = 0, False
    if epochs > 1:
        before_last = ((epochs - 1) * per_epoch - 1) // seq_length
        apart = num_samples - before_last < int(0.80 * ((per_epoch - 1) // seq_length))
    random = np.random.RandomState(seed)
    row = []
    for count in [epochs - 1, 1] if apart else [epochs]:
        part = np.array([d for _ in range(count) for d in documents], dtype=np.int32)
        random.shuffle(part)
        row += part.tolist()
    samples = walk(sizes, row, seq_length, (epochs * per_epoch - 1) // seq_length)
    shuffle = []
    total = len(samples) - 1
    for first, last in [(0, before_last), (before_last, total)] if apart else [(0, total)]:
        part = np.arange(first, last, dtype=np.uint32)
        random.shuffle(part)
        shuffle += part.tolist()
    return row, samples, shuffle, apart


def walk(sizes, row, seq_length, num_samples):
    """Take seq_length + 1 tokens at a time, and step back one."""
    place, offset = 0, 0
    samples = [[place, offset]]
    for _ in range(num_samples):
        wanted = seq_length + 1
        while wanted:
            left = sizes[row[place]] - offset
            if left >= wanted:
                offset += wanted - 1
                wanted = 0
            else:
                wanted -= left
                place, offset = place + 1, 0
        samples.append([place, offset])
    return samples


def assert_equal_to_reference(sizes, documents, seq_length, num_samples, seed):
    built = build_indices(
        np.array(sizes, np.int32), documents, seq_length=seq_length, num_samples=num_samples, seed=seed
    )
    row, samples, shuffle, apart = reference_indices(sizes, documents, seq_length, num_samples, seed)
    assert built["documents"].tolist() == row
    assert built["samples"].tolist() == samples
    assert built["shuffle"].tolist() == shuffle
    assert [built[name].dtype for name in ("documents", "samples", "shuffle")] == [np.int32, np.int32, np.uint32]
    return apart


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    skip=st.integers(0, 3),
    seq_length=st.integers(1, 24),
    num_samples=st.integers(1, 80),
    seed=st.integers(0, 2**32 - 1),
)
@example(sizes=[0, 0, 100, 0], skip=0, seq_length=8, num_samples=30, seed=1)  # longer than a sample; empty
@example(sizes=[1] * 20, skip=2, seq_length=4, num_samples=9, seed=2)  # one token each
@example(sizes=[5, 4], skip=0, seq_length=8, num_samples=1, seed=3)  # one sample, to the last token
def test_indices_equal_the_reference(sizes, skip, seq_length, num_samples, seed):
    documents = range(min(skip, len(sizes) - 1), len(sizes))
    if sum(sizes[d] for d in documents) < 2:
        return
    assert_equal_to_reference(sizes, documents, seq_length, num_samples, seed)


@pytest.mark.parametrize(
    ("num_samples", "apart"), [(49, False), (50, False), (51, True), (89, True), (90, False), (100, False), (101, True)]
)
def test_the_last_epoch_is_shuffled_apart_when_less_than_four_fifths_of_it_are_needed(num_samples, apart):
    sizes = [10, 1, 39, 150, 0, 200, 1]  # 401 tokens: 50 samples of 8 and the last label
    assert assert_equal_to_reference(sizes, range(len(sizes)), 8, num_samples, 7) == apart


@pytest.mark.parametrize("num_samples", [1, 400, 12345])
def test_many_epochs_of_a_few_documents_equal_the_reference(num_samples):
    assert_equal_to_reference([3, 17, 1, 0, 9], range(5), 7, num_samples, 42)


def test_indices_of_a_worked_example():
    """By hand: 4 documents of 5 tokens, samples of 4; RandomState(1234) shuffles [0 1 2 3], then [0 1 2 3] again.

    20 tokens hold (20 - 1) // 4 = 4 samples; sample k begins at token 4k, which is token 4k % 5 of document 4k // 5.
    """
    random = np.random.RandomState(1234)
    row, order = np.arange(4), np.arange(4)
    random.shuffle(row)
    random.shuffle(order)
    built = build_indices(np.full(4, 5, np.int32), range(4), seq_length=4, num_samples=4, seed=1234)
    assert built["documents"].tolist() == row.tolist()
    assert built["samples"].tolist() == [[0, 0], [0, 4], [1, 3], [2, 2], [3, 1]]
    assert built["shuffle"].tolist() == order.tolist()


GOLDEN = {
    5: (
        [4, 0, 1, 2, 3, 3, 2, 1, 0, 4],
        [[0, 0], [0, 6], [1, 1], [2, 3], [4, 0], [7, 2], [7, 8], [9, 1], [9, 7]],
        [2, 0, 3, 1, 5, 4, 7, 6],
    ),
    9: (
        [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1],
        [[0, 0], [2, 6], [3, 1], [3, 7], [5, 0], [6, 4], [6, 10], [8, 1], [8, 7], [10, 2], [11, 4], [11, 10], [14, 3]],
        [1, 0, 3, 5, 2, 7, 4, 6, 10, 9, 11, 8],
    ),
}
"""Document, sample and shuffle index by number of samples, printed by `GPTDataset` of megatron-core 0.16.1 for five
documents of 4, 9, 0, 2 and 11 tokens, sequence length 6, seed 1234; the last epoch is shuffled apart in both."""


@pytest.mark.parametrize("num_samples", GOLDEN)
def test_indices_are_those_that_megatron_core_prints(num_samples):
    sizes = np.array([4, 9, 0, 2, 11], np.int32)
    built = build_indices(sizes, range(5), seq_length=6, num_samples=num_samples, seed=1234)
    assert tuple(built[name].tolist() for name in ("documents", "samples", "shuffle")) == GOLDEN[num_samples]


def test_epochs_without_tokens_are_refused():
    with pytest.raises(ValueError, match="without tokens"):
        plan_epochs(0, 8, 1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    seq_length=st.integers(1, 16),
    num_samples=st.integers(1, 40),
)
def test_samples_are_the_row_cut_in_pieces(tmp_path_factory, sizes, seq_length, num_samples):
    if sum(sizes) < 2:
        return
    prefix = tmp_path_factory.mktemp("samples") / "text"
    documents = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    dataset = GPTDataset(
        IndexedDataset(prefix), range(len(sizes)), seq_length=seq_length, num_samples=num_samples, seed=5
    )
    assert len(dataset) >= num_samples
    row, _, shuffle, _ = reference_indices(sizes, range(len(sizes)), seq_length, num_samples, 5)
    tokens = np.concatenate([documents[d] for d in row])
    for i in range(len(dataset)):
        start = shuffle[i] * seq_length
        assert dataset[i].tolist() == tokens[start : start + seq_length + 1].tolist()
        assert dataset[i].dtype == np.int64
