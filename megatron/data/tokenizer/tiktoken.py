"""tiktoken's encodings: a well-known name (`cl100k_base`), or a file of ranks.

A file holds the tokens alone. How text is cut into words and which special tokens there are is known by the number of
its ranks, for the encodings in `FAMILIES`; any other file is refused rather than cut in a wrong way.
Special tokens written out in a text are ordinary text.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.tokenizer.files import TokenizerError, fingerprint, read_vocabulary, wrong_kind

_GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K_WORDS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}"
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


@dataclass(frozen=True)
class Family:
    """What a file of ranks leaves out: how words are cut, which id ends a document and how many ids there are."""

    words: str
    eod_token: str
    eod_id: int
    vocab_size: int


FAMILIES = {
    50256: Family(_GPT2_WORDS, "<|endoftext|>", 50256, 50257),  # gpt2, r50k_base
    50280: Family(_GPT2_WORDS, "<|endoftext|>", 50256, 50281),  # p50k_base
    100256: Family(_CL100K_WORDS, "<|endoftext|>", 100257, 100277),  # cl100k_base
    128000: Family(_CL100K_WORDS, "<|end_of_text|>", 128001, 128256),  # Llama 3
    199998: Family(_O200K_WORDS, "<|endoftext|>", 199999, 200019),  # o200k_base
}
"""By number of ranks."""


class TikTokenTokenizer:
    """A tiktoken encoding.

    Args:
        model: well-known name or path of a file of ranks, named by `--tokenizer-model`.

    Raises:
        TokenizerError: neither a name nor a file, a file of another kind or of an unknown encoding, a name that
            cannot be fetched, or the package `tiktoken` is missing.
    """

    name = "TikTokenizer"

    def __init__(self, model: str) -> None:
        self._encoding = _load(model)
        self.vocab_size: int = self._encoding.n_vocab
        self.eod_id = _find_eod(self._encoding)
        self.fingerprint = fingerprint(self.name, self.eod_id, [_describe_vocabulary(self._encoding)])

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._encoding.decode([int(id) for id in ids])
        return text


def _load(model: str) -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise TokenizerError(
            "--tokenizer-type TikTokenizer needs the package tiktoken: pip install 'megatron-deepspeed[data]'."
        ) from error
    if Path(model).exists():
        return _load_file(model)
    names = tiktoken.list_encoding_names()
    if model not in names:
        raise TokenizerError(f"--tokenizer-model {model} is neither a file nor one of {', '.join(names)}.")
    try:
        return tiktoken.get_encoding(model)
    except Exception as error:  # whatever the package's HTTP client raises
        raise TokenizerError(
            f"--tokenizer-model {model} could not be fetched ({type(error).__name__}): give the path of its file."
        ) from error


def _load_file(model: str) -> Any:
    from tiktoken import Encoding

    content = read_vocabulary("--tokenizer-model", model)
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise wrong_kind(
            "--tokenizer-model", model, content, "a tiktoken file (a base64 token and a rank a line)"
        ) from error
    family = FAMILIES.get(len(ranks))
    if family is None:
        raise TokenizerError(
            f"--tokenizer-model {model} holds {len(ranks)} ranks, but how words are cut is known for "
            f"{', '.join(map(str, FAMILIES))} alone: convert it to a tokenizer.json for HuggingFaceTokenizer."
        )
    special_tokens = {family.eod_token: family.eod_id}
    special_tokens.setdefault(f"<|reserved_{family.vocab_size - 1}|>", family.vocab_size - 1)
    return Encoding(Path(model).stem, pat_str=family.words, mergeable_ranks=ranks, special_tokens=special_tokens)


def _find_eod(encoding: Any) -> int:
    for token in ("<|endoftext|>", "<|end_of_text|>"):
        if token in encoding.special_tokens_set:
            eod_id: int = encoding.encode_single_token(token)
            return eod_id
    raise TokenizerError(f"The tiktoken encoding {encoding.name} has no token that ends a document.")


def _describe_vocabulary(encoding: Any) -> bytes:
    """One line a token, the same for a name and for its file."""
    tokens = encoding.token_byte_values()
    return b"".join(b"%d %s\n" % (encoding.encode_single_token(token), token.hex().encode()) for token in tokens)
