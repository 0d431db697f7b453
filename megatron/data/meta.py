"""The side file `<prefix>.meta.json`: which tokenizer made a `.bin/.idx` pair, and what the two files look like.

Size arithmetic cannot tell two `.bin` files of equal length apart, and the format itself does not say which tokenizer
its ids are of. Both are recorded here. A pair without a side file (made by an older system) is legal.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.data.atomic import write_json
from megatron.data.errors import DataError

META_FORMAT = 1
"""Value of the side file's `format` key."""

SAMPLED_BLOCKS = 64
BLOCK_BYTES = 4096


def index_path(prefix: str | os.PathLike[str]) -> Path:
    """`<prefix>.idx`."""
    return Path(f"{os.fspath(prefix)}.idx")


def tokens_path(prefix: str | os.PathLike[str]) -> Path:
    """`<prefix>.bin`."""
    return Path(f"{os.fspath(prefix)}.bin")


def meta_path(prefix: str | os.PathLike[str]) -> Path:
    """`<prefix>.meta.json`."""
    return Path(f"{os.fspath(prefix)}.meta.json")


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """The tokenizer that made a dataset; `fingerprint` is the hex sha256 of its name and vocabulary files."""

    name: str
    vocab_size: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class PairFingerprint:
    """Sizes in bytes and digests of a `.bin/.idx` pair.

    `idx_sha256` is of the whole index; `bin_sample_sha256` of evenly spaced blocks of the tokens, first and last
    included, so that it costs the same for any size.
    """

    idx_bytes: int
    bin_bytes: int
    idx_sha256: str
    bin_sample_sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetMeta:
    """Content of a side file.

    `max_token_id` is -1 when there are no tokens; `made_by` is free for the tool that wrote the pair (sources, flags).
    """

    tokenizer: TokenizerIdentity | None
    documents: int
    sequences: int
    tokens: int
    max_token_id: int
    dtype: str
    files: PairFingerprint
    made_by: dict[str, Any] = field(default_factory=dict)

    def write(self, prefix: str | os.PathLike[str]) -> None:
        """Write `<prefix>.meta.json`, atomically."""
        write_json(meta_path(prefix), {"format": META_FORMAT, **asdict(self)})

    @classmethod
    def read(cls, prefix: str | os.PathLike[str]) -> DatasetMeta | None:
        """Read `<prefix>.meta.json`; None when there is none.

        Raises:
            DataError: the file is not a side file that this version knows.
        """
        path = meta_path(prefix)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}): delete it to open the pair unchecked.") from error
        return cls._from_json(content, path)

    @classmethod
    def _from_json(cls, content: Any, path: Path) -> DatasetMeta:
        try:
            if content.pop("format") != META_FORMAT:
                raise DataError(f"{path} has a format other than {META_FORMAT}: read it with the version that made it.")
            tokenizer, files = content.pop("tokenizer"), content.pop("files")
            meta = cls(
                tokenizer=None if tokenizer is None else TokenizerIdentity(**tokenizer),
                files=PairFingerprint(**files),
                **content,
            )
            counts = (meta.documents, meta.sequences, meta.tokens, meta.max_token_id)
            if not all(isinstance(count, int) for count in counts):
                raise TypeError("a count that is not an integer")
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a side file of a dataset ({error}): delete it to open the pair unchecked."
            ) from error
        return meta


def fingerprint_pair(idx: Path, bin: Path) -> PairFingerprint:
    """Sizes and digests of the two files; reads the whole index and at most 256 KiB of the tokens."""
    return PairFingerprint(
        idx_bytes=idx.stat().st_size,
        bin_bytes=bin.stat().st_size,
        idx_sha256=_sha256(idx),
        bin_sample_sha256=_sampled_sha256(bin),
    )


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    num_blocks = min(SAMPLED_BLOCKS, -(-size // BLOCK_BYTES))
    last_start = max(size - BLOCK_BYTES, 0)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(num_blocks):
            file.seek(last_start * block // max(num_blocks - 1, 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
