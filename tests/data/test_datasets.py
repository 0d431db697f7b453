import multiprocessing
from itertools import pairwise

import numpy as np
import pytest

from megatron.config.data import DataConfig
from megatron.data.datasets import build_datasets
from megatron.data.errors import DataError, MissingDataError
from megatron.data.gpt_dataset import GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.meta import TokenizerIdentity
from megatron.data.tokenizer_check import check_tokenizer, highest_id

IDENTITY = TokenizerIdentity(name="first", vocab_size=1000, fingerprint="a" * 64)


def texts(count, first_id=1, length=20):
    return [np.full(length, first_id + i) for i in range(count)]


def build(config, num_train=8, num_valid=2, num_test=2, **more):
    return build_datasets(config, num_train=num_train, num_valid=num_valid, num_test=num_test, seed=3, **more)


def ids_of(dataset):
    return {int(token) for i in range(len(dataset)) for token in dataset[i]}


def test_a_split_gives_each_set_its_own_documents(write_pair):
    prefix = write_pair(texts(20))
    sets = build(DataConfig(data_path=(prefix,), split="80,10,10", seq_length=10))
    assert [ids_of(dataset) for dataset in sets] == [set(range(1, 17)), {17, 18}, {19, 20}]
    assert [len(dataset) >= asked for dataset, asked in zip(sets, (8, 2, 2), strict=True)] == [True] * 3


def test_separate_paths_give_whole_files(write_pair):
    paths = {
        f"{name}_data_path": (write_pair(texts(3, first_id), name=name),)
        for name, first_id in (("train", 1), ("valid", 11), ("test", 21))
    }
    sets = build(DataConfig(seq_length=10, **paths))
    assert [ids_of(dataset) for dataset in sets] == [{1, 2, 3}, {11, 12, 13}, {21, 22, 23}]


def test_a_blend_takes_samples_by_weight(write_pair):
    first, second = write_pair(texts(5), name="first"), write_pair(texts(5, 101), name="second")
    sets = build(DataConfig(data_path=("3", first, "1", second), split="1", seq_length=10), num_train=40, num_valid=0)
    of_second = [int(sets.train[i][0]) > 100 for i in range(40)]
    assert sum(of_second) == 10
    assert sets.valid is None


def test_sets_that_nobody_asks_for_are_not_built(write_pair):
    sets = build(
        DataConfig(data_path=(write_pair(texts(3)),), split="969,30,1", seq_length=10), num_valid=0, num_test=0
    )
    assert sets.train is not None
    assert (sets.valid, sets.test) == (None, None)


def test_a_share_without_documents_is_refused_by_name_and_numbers(write_pair):
    prefix = write_pair(texts(10))
    with pytest.raises(DataError) as refusal:
        build(DataConfig(data_path=(prefix,), split="969,30,1", seq_length=10))
    sentence = str(refusal.value)
    assert f"the valid set gets none of the 10 documents of {prefix} with a share of 0.03" in sentence


def test_a_share_of_too_few_tokens_is_refused(write_pair):
    prefix = write_pair([[1], *texts(1)])
    with pytest.raises(DataError, match=r"documents 0 to 1 of .*text hold 1 tokens"):
        build(DataConfig(data_path=(prefix,), split="1,1", seq_length=10), num_test=0)


def test_a_run_without_training_data_is_refused(write_pair):
    prefix = write_pair(texts(10))
    for config in (DataConfig(), DataConfig(valid_data_path=(prefix,)), DataConfig(data_path=(prefix,), split="0,1,0")):
        with pytest.raises(DataError, match="there is no training data"):
            build(config)


def test_both_kinds_of_paths_are_refused(write_pair):
    prefix = write_pair(texts(10))
    with pytest.raises(DataError, match="give the one or the others"):
        build(DataConfig(data_path=(prefix,), valid_data_path=(prefix,)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"nothing\.idx does not exist"):
        build(DataConfig(data_path=(str(tmp_path / "nothing"),)))


def test_mock_data_is_a_pure_function_of_seed_and_number():
    config = DataConfig(mock_data=True, vocab_size=64, seq_length=200)
    first, again = build(config), build(config)
    assert [len(dataset) for dataset in first] == [8, 2, 2]
    assert np.array_equal(first.train[3], again.train[3])
    assert not np.array_equal(first.train[3], first.train[4])
    assert not np.array_equal(first.train[0], first.valid[0])
    assert (first.train[0].dtype, len(first.train[0])) == (np.int64, 201)
    with pytest.raises(DataError, match="--mock-data needs --vocab-size"):
        build(DataConfig(mock_data=True))


def test_mock_data_can_be_learned():
    sets = build(DataConfig(mock_data=True, vocab_size=64, seq_length=200), num_train=100)
    follower = {}
    for i in range(100):
        sample = sets.train[i].tolist()
        for token, label in pairwise(sample):
            follower.setdefault(token, []).append(label)
    best = {token: max(set(labels), key=labels.count) for token, labels in follower.items()}
    unseen = sets.valid[0].tolist()
    hits = np.mean([best[token] == label for token, label in pairwise(unseen)])
    assert 0.7 < hits < 0.95


def test_data_of_another_tokenizer_is_refused_naming_both(write_pair):
    prefix = write_pair(texts(10), tokenizer=IDENTITY)
    config = DataConfig(data_path=(prefix,), split="1", seq_length=10)
    build(config, tokenizer=IDENTITY)
    other = TokenizerIdentity(name="second", vocab_size=1000, fingerprint="b" * 64)
    with pytest.raises(DataError) as refusal:
        build(config, tokenizer=other)
    for part in (f"{prefix}.bin", "first (1000 ids, aaaaaaaaaaaa)", "second (1000 ids, bbbbbbbbbbbb)"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("side_file", [True, False])
def test_data_of_an_unknown_tokenizer_is_noted_and_its_ids_are_checked(write_pair, side_file):
    indexed = IndexedDataset(write_pair(texts(10), side_file=side_file))
    said = []
    check_tokenizer(indexed, IDENTITY, said.append)
    assert len(said) == 1
    assert "text.meta.json does not say which tokenizer" in said[0]
    small = TokenizerIdentity(name="small", vocab_size=10, fingerprint="c" * 64)
    with pytest.raises(DataError, match="holds the token id 10, and small has 10 ids"):
        check_tokenizer(indexed, small, said.append)


def test_a_large_file_is_looked_at_in_evenly_spaced_blocks(write_pair, monkeypatch):
    monkeypatch.setattr("megatron.data.tokenizer_check.SCANNED_WHOLE", 10)
    monkeypatch.setattr("megatron.data.tokenizer_check.BLOCK_TOKENS", 4)
    monkeypatch.setattr("megatron.data.tokenizer_check.SCANNED_BLOCKS", 3)
    assert highest_id(IndexedDataset(write_pair([[9] + [1] * 48 + [7]]))) == 9
    assert highest_id(IndexedDataset(write_pair([[1] * 49 + [7]], name="last"))) == 7


@pytest.mark.parametrize("change", ["seed", "seq_length", "num_samples", "documents", "content"])
def test_indices_are_cached_under_everything_they_depend_on(write_pair, change):
    def describe(prefix, documents=range(10), **changes):
        values = {"seq_length": 10, "num_samples": 8, "seed": 3, **changes}
        return GPTDataset(IndexedDataset(prefix), documents, **values).description

    before = describe(write_pair(texts(10)))
    assert describe(write_pair(texts(10))) == before
    if change == "content":
        after = describe(write_pair(texts(10, length=21)))
    elif change == "documents":
        after = describe(write_pair(texts(10)), documents=range(9))
    else:
        after = describe(write_pair(texts(10)), **{change: 9})
    assert after != before


def _build_elsewhere(config, answers):
    answers.put(ids_of(build(config).train))


def test_processes_of_a_run_share_one_cache_beside_the_data(write_pair, tmp_path):
    config = DataConfig(data_path=(write_pair(texts(20)),), split="80,10,10", seq_length=10)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_build_elsewhere, args=(config, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=20) for _ in processes] == [set(range(1, 17))] * 4
    for process in processes:
        process.join()
    entries = list((tmp_path / "cache").iterdir())
    assert len(entries) == 3
    assert all(entry.is_dir() for entry in entries)
