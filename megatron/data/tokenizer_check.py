"""The check that data was made with the tokenizer of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.meta import meta_path, tokens_path

SCANNED_WHOLE = 1 << 25
SCANNED_BLOCKS = 1024
BLOCK_TOKENS = 1 << 14


class TokenizerLike(Protocol):
    """What is compared of a tokenizer."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of name and vocabulary files."""


def check_tokenizer(indexed: IndexedDataset, tokenizer: TokenizerLike, note: Callable[[str], None] = print) -> None:
    """Refuse data that another tokenizer made, or that holds ids the tokenizer does not have.

    A file without a record of its tokenizer (made by an older system) gets a printed note, and its ids are looked at:
    all of them up to 33 million tokens, 17 million evenly spaced ones of more.

    Raises:
        DataError: naming both tokenizers, or the id and the vocabulary.
    """
    made_with = None if indexed.meta is None else indexed.meta.tokenizer
    if made_with is None:
        note(
            f"{meta_path(indexed.prefix)} does not say which tokenizer made {tokens_path(indexed.prefix).name}: only "
            f"the range of its token ids is compared with {tokenizer.name}."
        )
    elif made_with.fingerprint != tokenizer.fingerprint or made_with.vocab_size > tokenizer.vocab_size:
        raise DataError(
            f"{tokens_path(indexed.prefix)} was made with the tokenizer {made_with.name} ({made_with.vocab_size} ids, "
            f"{made_with.fingerprint[:12]}), and this run has {tokenizer.name} ({tokenizer.vocab_size} ids, "
            f"{tokenizer.fingerprint[:12]}): give the tokenizer flags that the data was made with, or make the data "
            f"again with tools/preprocess_data.py."
        )
    highest = highest_id(indexed) if indexed.meta is None else indexed.meta.max_token_id
    if highest >= tokenizer.vocab_size:
        raise DataError(
            f"{tokens_path(indexed.prefix)} holds the token id {highest}, and {tokenizer.name} has "
            f"{tokenizer.vocab_size} ids: give the tokenizer that the data was made with."
        )


def highest_id(indexed: IndexedDataset) -> int:
    """Find the highest id of a file, or of evenly spaced blocks of a large one; -1 without tokens."""
    tokens = indexed.tokens
    if len(tokens) == 0:
        return -1
    if len(tokens) <= SCANNED_WHOLE:
        return int(tokens.max())
    last_start = len(tokens) - BLOCK_TOKENS
    starts = [last_start * block // (SCANNED_BLOCKS - 1) for block in range(SCANNED_BLOCKS)]
    return int(np.max([tokens[start : start + BLOCK_TOKENS].max() for start in starts]))
