import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.blend import BlendedDataset, build_blend_indices, parse_blend, samples_to_build
from megatron.data.errors import DataError
from megatron.data.mock import MockDataset


def greedy(shares, num_samples):
    """Megatron-LM's rule, one sample at a time: the first dataset with the largest error."""
    counts = [0] * len(shares)
    order = []
    for t in range(num_samples):
        errors = [share * max(t, 1.0) - float(count) for share, count in zip(shares, counts, strict=True)]
        chosen = errors.index(max(errors))
        order.append((chosen, counts[chosen]))
        counts[chosen] += 1
    return order


def normalised(weights):
    return (np.array(weights) / np.sum(weights)).tolist()


WEIGHTS = st.lists(
    st.one_of(st.floats(1e-3, 1e3), st.sampled_from([1.0, 2.0, 0.5, 1 / 3])), min_size=1, max_size=12
).map(normalised)


@settings(max_examples=40, deadline=None)
@given(shares=WEIGHTS, num_samples=st.integers(1, 3000))
def test_order_equals_the_sequential_rule(shares, num_samples):
    dataset, number = build_blend_indices(shares, num_samples)
    assert list(zip(dataset.tolist(), number.tolist(), strict=True)) == greedy(shares, num_samples)


@settings(max_examples=60, deadline=None)
@given(shares=WEIGHTS, num_samples=st.integers(1, 3000))
def test_no_dataset_is_a_sample_ahead_of_its_share_nor_two_behind(shares, num_samples):
    dataset, _ = build_blend_indices(shares, num_samples)
    counts = np.stack([np.cumsum(dataset == i) for i in range(len(shares))])
    error = counts - np.outer(shares, np.arange(1, num_samples + 1))
    assert error.max() <= 1 + 1e-9
    assert np.all(counts[:, -1] <= [math.ceil(share * num_samples) for share in shares])
    assert error.min() > -2


def test_order_is_the_one_that_megatron_core_prints():
    """`build_blending_indices` of megatron-core 0.16.1."""
    dataset, _ = build_blend_indices([0.5, 0.3, 0.2], 20)
    assert dataset.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0, 2, 0, 1, 0]


def test_more_datasets_than_a_byte_counts():
    shares = normalised([1.0 + (i % 7) for i in range(1000)])
    dataset, number = build_blend_indices(shares, 20000)
    assert np.abs(np.bincount(dataset, minlength=1000) - 20000 * np.array(shares)).max() <= 1
    assert all(np.array_equal(number[dataset == i], np.arange((dataset == i).sum())) for i in (0, 500, 999))


def test_ten_million_samples_take_seconds():
    start = time.process_time()
    dataset, _ = build_blend_indices(normalised([5, 3, 1.5, 0.7, 0.1]), 10_000_000)
    assert len(dataset) == 10_000_000
    assert time.process_time() - start < 30


@pytest.mark.parametrize(
    ("words", "prefixes", "shares"),
    [
        (["a"], ["a"], [1.0]),
        (["a", "b", "c", "d"], ["a", "b", "c", "d"], [0.25] * 4),
        (["0.3", "a", "0.7", "b"], ["a", "b"], [0.3, 0.7]),
        (["3", "a", "1", "b"], ["a", "b"], [0.75, 0.25]),
        (["2", "a"], ["a"], [1.0]),
        ([], [], []),
    ],
)
def test_words_of_a_blend_are_read(words, prefixes, shares):
    blend = parse_blend(words, "--data-path")
    assert [part.prefix for part in blend] == prefixes
    assert [part.weight for part in blend] == pytest.approx(shares)


@pytest.mark.parametrize("words", [["0.3", "a", "b"], ["a", "0.3"], ["0.3", "a", "0.7"], ["0.3", "0.7"], ["1"]])
def test_words_that_mix_weights_and_prefixes_are_refused(words):
    with pytest.raises(DataError, match=r"--train-data-path .* mixes prefixes with and without a weight"):
        parse_blend(words, "--train-data-path")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_are_positive(weight):
    with pytest.raises(DataError, match="gives a the weight"):
        parse_blend([weight, "a", "1", "b"], "--data-path")


def _mock(num_samples, seed):
    return MockDataset(vocab_size=50, seq_length=4, num_samples=num_samples, seed=seed)


def test_a_blend_reads_each_dataset_in_its_own_order():
    parts = [_mock(samples_to_build(40, 0.25), 1), _mock(samples_to_build(40, 0.75), 2)]
    blend = BlendedDataset(parts, [0.25, 0.75], num_samples=40)
    expected = [parts[dataset][number].tolist() for dataset, number in greedy([0.25, 0.75], 40)]
    assert [blend[i].tolist() for i in range(len(blend))] == expected


def test_a_dataset_that_is_too_short_for_its_share_is_refused():
    with pytest.raises(DataError, match="takes 30 of a dataset that has 29"):
        BlendedDataset([_mock(11, 1), _mock(29, 2)], [0.25, 0.75], num_samples=40)
