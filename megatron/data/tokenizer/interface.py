"""What the framework asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back.

    `encode` adds no token of its own (no begin, no end) and takes every text that is valid Unicode; who wants an end
    of document appends `eod_id`. Both encoders keep one core busy: more cores are used by more processes.

    Attributes:
        name: the value of `--tokenizer-type` that builds it.
        vocab_size: ids are in `[0, vocab_size)`.
        eod_id: the id that ends a document.
        fingerprint: hex sha256 of the name, the end-of-document id and the content of the vocabulary.
    """

    name: str
    vocab_size: int
    eod_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises `ValueError` for a text that has none (words given to `NullTokenizer`)."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, faster."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids: `decode(encode(text)) == text` wherever the kind of tokenizer can hold it."""
