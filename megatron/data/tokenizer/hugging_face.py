"""Tokenizers of the Hugging Face `tokenizers` library: a `tokenizer.json`, or a folder that holds one.

Ids equal those of `transformers` with `add_special_tokens=False`: special tokens written out in a text are recognised,
none is added. Truncation and padding stored in the file are switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.data.tokenizer.files import (
    TokenizerError,
    fingerprint,
    parse_json_object,
    read_vocabulary,
    wrong_kind,
)

EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eod>", "<eos>", "<|eot_id|>", "[EOS]")
"""Tokens that end a document when `tokenizer_config.json` names none, in order of preference."""


class HuggingFaceTokenizer:
    """A `tokenizer.json`.

    The end of a document is the `eos_token` of `tokenizer_config.json` or `special_tokens_map.json` in the same
    folder; without one, the first of `EOD_TOKENS` that the vocabulary has.

    Args:
        model: path of the file or of its folder, named by `--tokenizer-model`.

    Raises:
        TokenizerError: no such file, another kind of file, or no token that ends a document.
    """

    name = "HuggingFaceTokenizer"

    def __init__(self, model: str) -> None:
        path = _find_file(Path(model))
        content = read_vocabulary("--tokenizer-model", path)
        self._tokenizer = _load(path, content)
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.eod_id = _find_eod(path, ids)
        self.fingerprint = fingerprint(self.name, self.eod_id, [content])

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encode = self._tokenizer.encode_batch_fast  # without offsets; with one text, on one thread
        return [encode([text], add_special_tokens=False)[0].ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        text: str = self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)
        return text


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if not (path / "tokenizer.json").is_file():
        raise TokenizerError(
            f"--tokenizer-model {path} is a folder without a tokenizer.json: save one with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`."
        )
    return path / "tokenizer.json"


def _load(path: Path, content: bytes) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except ValueError as error:
        raise wrong_kind("--tokenizer-model", path, content, "a Hugging Face tokenizer.json") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _find_eod(path: Path, ids: dict[str, int]) -> int:
    for neighbour in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _eos_token(path.with_name(neighbour))
        if token is None:
            continue
        if token not in ids:
            raise TokenizerError(
                f"{path.with_name(neighbour)} names {token!r} as eos_token, but {path} has no such token."
            )
        return ids[token]
    for token in EOD_TOKENS:
        if token in ids:
            return ids[token]
    raise TokenizerError(
        f"--tokenizer-model {path} has no token that ends a document ({', '.join(EOD_TOKENS)}): name one as eos_token "
        "in a tokenizer_config.json beside it."
    )


def _eos_token(path: Path) -> str | None:
    """Read the `eos_token` that a settings file names, as text or as an object with `content`."""
    if not path.is_file():
        return None
    settings = parse_json_object("--tokenizer-model", path, read_vocabulary("--tokenizer-model", path), "a JSON object")
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
