"""The order of the samples that a resumed run takes: kept, or changed on purpose, never in silence."""

import json

import numpy as np
import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.config.data import DataConfig
from megatron.data.datasets import build_datasets
from megatron.data.indexed import IndexedDatasetWriter
from megatron.training.sample_order import Continued, SampleOrder, open_in_order

TOKENIZER = {"name": "NullTokenizer", "fingerprint": "00ff" * 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate("ab"):
        random = np.random.default_rng(seed)
        with IndexedDatasetWriter(folder / name, np.uint16) as file:
            for _ in range(50):
                file.add_document(random.integers(60, size=9).astype(np.uint16))
    (folder / "moved").mkdir()
    for suffix in (".bin", ".idx", ".meta.json"):
        if (folder / f"a{suffix}").exists():
            (folder / "moved" / f"renamed{suffix}").write_bytes((folder / f"a{suffix}").read_bytes())
    return folder


class Opening:
    """Opens data, and notes for how many samples."""

    def __init__(self, folder, words="a", split="1", seed=1, mock=False):
        path = tuple(word if word[0].isdigit() else str(folder / word) for word in words.split())
        self.config = DataConfig(
            data_path=() if mock else path, split=split, mock_data=mock, vocab_size=60, seq_length=8
        )
        self.seed = seed
        self.asked = []

    def __call__(self, num_train):
        self.asked.append(num_train)
        return build_datasets(
            self.config, num_train=num_train, num_valid=0, num_test=0, seed=self.seed, note=lambda text: None
        )


def begin(opening, total=80):
    datasets, order = open_in_order(opening, total, None, TOKENIZER, pytest.fail)
    return datasets, SampleOrder.from_json(json.loads(json.dumps(order.to_json())))


def go_on(opening, order, total=80, consumed=30, tokenizer=TOKENIZER, **how):
    said = []
    datasets, found = open_in_order(
        opening, total, Continued(order=order, consumed=consumed, **how), tokenizer, said.append
    )
    return datasets, found, said


@pytest.mark.parametrize("words", ["a", "0.3 a 0.7 b"])
def test_another_length_of_the_training_keeps_the_order(folder, words):
    """Made anew for another number of samples it would be another one, as the last line shows."""
    first, order = begin(Opening(folder, words))
    longer = Opening(folder, words)
    datasets, found, said = go_on(longer, order, total=500)
    assert longer.asked == [80]
    assert found == order
    assert all(np.array_equal(datasets.train[i], first.train[i]) for i in range(80))
    assert len(said) == 1
    assert "stays the one that was made for 80, of 500 now; after number" in said[0]
    anew = Opening(folder, words)(500)
    assert not all(np.array_equal(anew.train[i], first.train[i]) for i in range(80))


def test_the_same_data_in_another_place_is_the_same(folder):
    _, order = begin(Opening(folder))
    assert go_on(Opening(folder, "moved/renamed"), order)[1:] == (
        SampleOrder(**{**order.to_json(), "samples": {**order.samples, "name": "renamed"}}),
        [],
    )


OTHERS = {
    "other data": ({"words": "b"}, {}, "data a ("),
    "a blend": ({"words": "a b"}, {}, "data one file -> a blend"),
    "synthetic data": ({"mock": True}, {}, "data one file -> --mock-data"),
    "other split": ({"split": "80,20"}, {}, "documents of a 0 to 50 -> 0 to 40 (--split)"),
    "other tokenizer": ({}, {"tokenizer": {"name": "GPT2BPETokenizer", "fingerprint": "ab" * 32}}, "tokenizer Null"),
    "other flags": ({}, {"flags": ["--seed 1 -> 2", "--seq-length 8 -> 16"]}, "--seed 1 -> 2, --seq-length 8 -> 16"),
}


@pytest.mark.parametrize(("opening", "how", "told"), OTHERS.values(), ids=OTHERS)
def test_other_samples_are_refused_with_what_differs(folder, opening, how, told):
    _, order = begin(Opening(folder))
    with pytest.raises(CheckpointError) as caught:
        go_on(Opening(folder, **opening), order, **how)
    assert told in str(caught.value)
    assert "--override-data" in str(caught.value)


def test_blends_are_compared_part_by_part(folder):
    _, order = begin(Opening(folder, "0.3 a 0.7 b"))
    with pytest.raises(CheckpointError, match=r"weights of the data 0.3 0.7 -> 0.5 0.5; go on"):
        go_on(Opening(folder, "0.5 a 0.5 b"), order)
    with pytest.raises(CheckpointError, match=r"data a \(\w+\) -> b \(\w+\), data b \(\w+\) -> a \(\w+\); go on"):
        go_on(Opening(folder, "0.3 b 0.7 a"), order)


def test_meant_other_samples_begin_with_their_first_and_are_kept_from_then_on(folder):
    _, order = begin(Opening(folder))
    other = Opening(folder, "b")
    _, found, said = go_on(other, order, override=True)
    assert (found.start, found.num_samples, other.asked) == (30, 50, [80, 50])
    assert len(said) == 1
    assert "50 to come: data a (" in said[0]
    again = Opening(folder, "b")
    assert go_on(again, found, consumed=60, override=True)[1:] == (found, []), "what is no difference overrides nothing"
    assert again.asked == [50]


def test_a_checkpoint_that_does_not_tell_its_samples_is_continued_by_number(folder):
    _, found, said = go_on(Opening(folder), None)
    assert (found.start, found.num_samples) == (0, 80)
    assert "does not tell its samples" in said[0]
