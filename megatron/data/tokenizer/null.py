"""No tokenizer: the text is ids already, as decimal numbers between spaces."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.data.tokenizer.files import TokenizerError, fingerprint


class NullTokenizer:
    """Ids written as text ("17 4 0").

    `--vocab-size` counts all ids, as it does everywhere else, and the last one ends a document: `eod_id` is
    `vocab_size - 1`. Megatron-LM counts it on top: its `--vocab-size N` is `N + 1` here.

    Args:
        vocab_size: number of ids, the end of document among them.

    Raises:
        TokenizerError: fewer than two ids.
    """

    name = "NullTokenizer"

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 2:
            raise TokenizerError(f"--vocab-size {vocab_size} is too small: one token and the end of document are 2.")
        self.vocab_size = vocab_size
        self.eod_id = vocab_size - 1
        self.fingerprint = fingerprint(self.name, self.eod_id, [])

    def encode(self, text: str) -> list[int]:
        """Ids that the text spells. Raises `ValueError` for a word that is not one of them."""
        return [self._parse(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Join the ids with one space."""
        return " ".join(str(int(id)) for id in ids)

    def _parse(self, word: str) -> int:
        if not (word.isascii() and word.isdigit()) or int(word) >= self.vocab_size:
            raise ValueError(f"{word[:20]!r} is not an id below the vocabulary size {self.vocab_size}")
        return int(word)
