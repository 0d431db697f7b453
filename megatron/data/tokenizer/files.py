"""Reads vocabulary files, and says in one sentence what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.config.errors import UserError


class TokenizerError(UserError, ValueError):
    """A tokenizer cannot be built from the files and flags that were given."""


def read_vocabulary(flag: str, path: str | Path) -> bytes:
    """Content of the file that `flag` names.

    Raises:
        TokenizerError: there is no such file, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(f"{flag} {path} does not exist: give the path of the tokenizer's file.") from error
    except IsADirectoryError as error:
        raise TokenizerError(f"{flag} {path} is a folder: give the path of the tokenizer's file in it.") from error
    except OSError as error:
        raise TokenizerError(f"{flag} {path} cannot be read ({error.strerror}).") from error


def parse_json_object(flag: str, path: str | Path, content: bytes, kind: str) -> dict[str, Any]:
    """Parse the JSON object in `content`, the file that `flag` names; `kind` says what it should have been.

    Raises:
        TokenizerError: it is not a JSON object, or an empty one.
    """
    parsed = _json_object(content)
    if not parsed:
        raise wrong_kind(flag, path, content, kind)
    return parsed


def wrong_kind(flag: str, path: str | Path, content: bytes, kind: str) -> TokenizerError:
    """Make the error of a file that is not of its `kind`, naming what it looks like."""
    return TokenizerError(f"{flag} {path} is not {kind}{_looks_like(content)}.")


def _looks_like(content: bytes) -> str:
    """Say what a vocabulary file is, as the end of a sentence; nothing when it is none that we know."""
    for what, looks_so, way_out in (
        ("a Hugging Face tokenizer.json", _is_tokenizer_json, "HuggingFaceTokenizer"),
        ("a vocab.json", _is_vocab_json, "GPT2BPETokenizer with --vocab-file and --merge-file"),
        ("a merges.txt", _is_merges, "GPT2BPETokenizer with --vocab-file and --merge-file"),
        ("a tiktoken file", _is_tiktoken, "TikTokenizer"),
        ("a SentencePiece model", _is_sentencepiece, "SentencePieceTokenizer"),
    ):
        if looks_so(content):
            return f"; it looks like {what}: use --tokenizer-type {way_out}"
    return ""


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _is_tokenizer_json(content: bytes) -> bool:
    return isinstance(_json_object(content).get("model"), dict)


def _is_vocab_json(content: bytes) -> bool:
    ids = _json_object(content).values()
    return bool(ids) and all(type(id) is int for id in ids)


def _is_merges(content: bytes) -> bool:
    return content.startswith(b"#version")


def _is_tiktoken(content: bytes) -> bool:
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content) is not None


def _is_sentencepiece(content: bytes) -> bool:
    return content.startswith(b"\n") and b"<unk>" in content[:64]


def fingerprint(name: str, eod_id: int, contents: Iterable[bytes]) -> str:
    """Hex sha256 over a tokenizer's name, its end-of-document id and the content of its vocabulary, in order.

    Paths do not enter, so that a copied tokenizer is the same one; lengths do, so that contents cannot be cut anew.
    """
    digest = hashlib.sha256(f"{name}\n{eod_id}\n".encode())
    for content in contents:
        digest.update(f"{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
