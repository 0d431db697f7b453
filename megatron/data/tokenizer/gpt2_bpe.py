"""GPT-2's byte-level BPE from its two files, `vocab.json` and `merges.txt`.

Ids are those of GPT-2 (Radford et al., 2019, `encoder.py`), also for `<|endoftext|>` inside a text: it is ordinary text
there, so that no document can end itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.data.tokenizer.files import (
    TokenizerError,
    fingerprint,
    parse_json_object,
    read_vocabulary,
    wrong_kind,
)

END_OF_TEXT = "<|endoftext|>"


class GPT2BPETokenizer:
    """Byte-level BPE with GPT-2's way of cutting words.

    Args:
        vocab_file: path of `vocab.json` (token to id), named by `--vocab-file`.
        merge_file: path of `merges.txt` (one pair a line, by rank), named by `--merge-file`.

    Raises:
        TokenizerError: a file is missing or of another kind, the two are not of one tokenizer, or `<|endoftext|>`
            is not in the vocabulary.
    """

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        vocab_content = read_vocabulary("--vocab-file", vocab_file)
        merge_content = read_vocabulary("--merge-file", merge_file)
        vocab = _parse_vocab(vocab_file, vocab_content)
        merges = _parse_merges(merge_file, merge_content)
        if END_OF_TEXT not in vocab:
            raise TokenizerError(f"--vocab-file {vocab_file} has no {END_OF_TEXT}: give GPT-2's kind of vocab.json.")
        _check_pair(vocab, merges, vocab_file, merge_file)
        self._tokenizer = _build(vocab, merges)
        self.vocab_size = max(vocab.values()) + 1
        self.eod_id = vocab[END_OF_TEXT]
        self.fingerprint = fingerprint(self.name, self.eod_id, [vocab_content, merge_content])

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encode = self._tokenizer.encode_batch_fast  # without offsets; with one text, on one thread
        return [encode([text], add_special_tokens=False)[0].ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)
        return text


def _parse_vocab(vocab_file: str, content: bytes) -> dict[str, int]:
    vocab = parse_json_object("--vocab-file", vocab_file, content, "a vocab.json")
    if not all(type(id) is int and id >= 0 for id in vocab.values()):
        raise wrong_kind("--vocab-file", vocab_file, content, "a vocab.json (token to id)")
    return vocab


def _parse_merges(merge_file: str, content: bytes) -> list[tuple[str, str]]:
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise wrong_kind("--merge-file", merge_file, content, "a merges.txt") from error
    first = 1 if lines[0].startswith("#version") else 0
    merges = []
    for number, line in enumerate(lines[first:], start=first + 1):
        pair = line.rstrip("\r").split(" ")
        if pair == [""]:
            continue
        if len(pair) != 2:
            raise TokenizerError(f"--merge-file {merge_file}, line {number} is not a pair of tokens: {line[:40]!r}.")
        merges.append((pair[0], pair[1]))
    return merges


def _check_pair(vocab: dict[str, int], merges: list[tuple[str, str]], vocab_file: str, merge_file: str) -> None:
    """Refuse merges of tokens that are not there: the library panics on them."""
    for left, right in merges:
        absent = [token for token in (left, right, left + right) if token not in vocab]
        if absent:
            raise TokenizerError(
                f"--merge-file {merge_file} merges {left!r} and {right!r}, but --vocab-file {vocab_file} has no "
                f"{absent[0]!r}: give two files of one tokenizer."
            )


def _build(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
