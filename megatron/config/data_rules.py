"""Rules of the data's source, its split and its tokenizer."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.config.data import DataConfig
from megatron.config.flags import spell
from megatron.config.training import TrainingConfig

OWN_PATHS = ("train_data_path", "valid_data_path", "test_data_path")

TOKENIZER_NEEDS = {
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
}
"""What each kind of tokenizer is made from."""


def data_has_one_source(data: DataConfig) -> Iterator[str]:
    """Text comes from one place: a split path, paths of their own, or nowhere (synthetic)."""
    own = [spell(name) for name in OWN_PATHS if getattr(data, name)]
    sources = ["--data-path"] if data.data_path else []
    sources += [" and ".join(own)] if own else []
    sources += ["--mock-data"] if data.mock_data else []
    if not sources:
        yield "there is no data: give --data-path (or --train-data-path and its likes), or --mock-data to do without."
    if len(sources) > 1:
        yield f"{', '.join(sources)} are {len(sources)} sources of data: give one."


def training_data_is_given(data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    """Validation and test data of their own do not train a model."""
    own = [spell(name) for name in OWN_PATHS[1:] if getattr(data, name)]
    if own and not data.train_data_path and not data.data_path and not training.skip_train:
        yield f"{' and '.join(own)} without --train-data-path: give the training data, or --skip-train."


def split_is_up_to_three_shares(data: DataConfig) -> Iterator[str]:
    """The split is numbers of documents, in proportion, for train, validation and test."""
    try:
        shares = [float(word) for word in data.split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        yield (
            f"--split {data.split!r} is not up to three shares (train, validation, test), none negative and not all "
            f'zero: write it like "969,30,1".'
        )


def tokenizer_is_known(data: DataConfig) -> Iterator[str]:
    """The tokenizer's kind is given or follows."""
    if data.tokenizer_type is None:
        yield "--tokenizer-type is missing: name the tokenizer that made the data (or give --vocab-size alone)."


def tokenizer_has_its_files(data: DataConfig) -> Iterator[str]:
    """A tokenizer is made from what its kind needs."""
    for name in TOKENIZER_NEEDS.get(data.tokenizer_type, ()):
        if getattr(data, name) is None:
            yield f"--tokenizer-type {data.tokenizer_type} needs {spell(name)}."


def synthetic_data_has_a_vocabulary(data: DataConfig) -> Iterator[str]:
    """Synthetic tokens are drawn from a vocabulary of a given size."""
    if data.mock_data and data.vocab_size is None:
        yield "--mock-data draws tokens from a vocabulary of --vocab-size, which is missing."
