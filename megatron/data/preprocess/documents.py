"""Documents out of a piece of an input file: JSON objects a line, text, or rows of a Parquet column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from megatron.data.errors import DataError
from megatron.data.preprocess.inputs import kind_of, open_content

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

PARQUET_ROWS = 256
"""Rows of a Parquet file that are in memory at once."""
EXCERPT_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class ReadingRules:
    """What a document is.

    Attributes:
        keys: members of a JSON object that hold text; each goes into an output of its own.
        text_document: what of a text file is one document: the `file`, each `line`, or what stands between
            `blank-line`s.
        columns: columns of a Parquet file, one for each key.
    """

    keys: tuple[str, ...] = ("text",)
    text_document: str = "file"
    columns: tuple[str, ...] = ("text",)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of whole documents of one input file.

    `start` and `end` count bytes of the unpacked content, or row groups of a Parquet file; without an `end` the piece
    goes to the end. `unpacked` is a file that holds just this piece, where the input itself is compressed.
    """

    path: str
    start: int = 0
    end: int | None = None
    unpacked: str | None = None


class Document(NamedTuple):
    """Texts of one document, one for each key; `line` counts from 1 inside the piece (lines, or Parquet rows)."""

    line: int
    texts: tuple[str, ...]


class Malformed(NamedTuple):
    """A line that is no document, and why; `excerpt` is how it begins."""

    line: int
    reason: str
    excerpt: str


class PieceReader:
    """Iterates over the documents of a piece, and over what is malformed in it, in order.

    Attributes:
        lines: number of lines (rows) read so far; after the last document, of the whole piece.

    Raises:
        DataError: the file is damaged, or has no such column, or does not go with several keys.
    """

    def __init__(self, piece: Piece, rules: ReadingRules) -> None:
        self.lines = 0
        self._piece = piece
        self._rules = rules

    def __iter__(self) -> Iterator[Document | Malformed]:
        kind = kind_of(self._piece.path)
        if kind == "parquet":
            yield from self._parquet_rows()
            return
        if kind == "text" and len(self._rules.keys) > 1:
            raise DataError(f"{self._piece.path} is text, which has no keys: give one of --json-keys, or JSON lines.")
        with open_content(self._piece.unpacked or self._piece.path) as stream:
            if kind == "jsonl":
                yield from self._json_lines(stream)
            elif self._rules.text_document == "file":
                yield from self._whole_text(stream)
            else:
                yield from self._text_lines(stream)

    def _raw_lines(self, stream: BinaryIO) -> Iterator[bytes]:
        """Yield the lines of the piece with their ends; the one line that is in memory is counted in `lines`."""
        start = 0 if self._piece.unpacked else self._piece.start
        left = None if self._piece.unpacked or self._piece.end is None else self._piece.end - start
        if start:
            stream.seek(start)
        while left is None or left > 0:
            raw = stream.readline()
            if not raw:
                return
            self.lines += 1
            if left is not None:
                left -= len(raw)
            yield raw

    def _json_lines(self, stream: BinaryIO) -> Iterator[Document | Malformed]:
        for raw in self._raw_lines(stream):
            if not raw.isspace():
                yield parse_json_line(raw, self._rules.keys, self.lines)

    def _whole_text(self, stream: BinaryIO) -> Iterator[Document | Malformed]:
        content = stream.read()
        self.lines = content.count(b"\n") + (not content.endswith(b"\n"))
        yield _decode_text(content, 1)

    def _text_lines(self, stream: BinaryIO) -> Iterator[Document | Malformed]:
        """Yield documents of one line, or of the lines between blank ones, without the end of the last line."""
        by_line = self._rules.text_document == "line"
        gathered: list[bytes] = []
        for raw in self._raw_lines(stream):
            if by_line:
                yield _decode_text(_without_end(raw), self.lines)
            elif not raw.isspace():
                gathered.append(raw)
            elif gathered:
                yield _decode_text(_without_end(b"".join(gathered)), self.lines - len(gathered))
                gathered = []
        if gathered:
            yield _decode_text(_without_end(b"".join(gathered)), self.lines - len(gathered) + 1)

    def _parquet_rows(self) -> Iterator[Document | Malformed]:
        file = open_parquet(self._piece.path)
        absent = [column for column in self._rules.columns if column not in file.schema_arrow.names]
        if absent:
            raise DataError(
                f"{self._piece.path} has no column {absent[0]!r}: name one of {', '.join(file.schema_arrow.names)} "
                "with --parquet-column."
            )
        end = file.num_row_groups if self._piece.end is None else self._piece.end
        batches = file.iter_batches(
            batch_size=PARQUET_ROWS,
            row_groups=list(range(self._piece.start, end)),
            columns=list(self._rules.columns),
            use_threads=False,
        )
        for batch in batches:
            columns = [batch.column(column).to_pylist() for column in self._rules.columns]
            for values in zip(*columns, strict=True):
                self.lines += 1
                yield _check_texts(self._rules.columns, values, self.lines)


def open_parquet(path: str | Path) -> ParquetFile:
    """Open a Parquet file.

    Raises:
        DataError: it is not one, or the package is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs the package pyarrow: pip install 'megatron-deepspeed[data]'.") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file, or is cut: copy it anew from its source.") from error


def parse_json_line(raw: bytes, keys: tuple[str, ...], line: int) -> Document | Malformed:
    """Take the texts of `keys` out of one line that holds a JSON object."""
    try:
        text = _without_end(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        return Malformed(line, f"not UTF-8 (byte 0x{raw[error.start]:02x})", _excerpt(raw))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        return Malformed(line, f"not JSON ({error.msg}, column {error.colno})", text[:EXCERPT_CHARACTERS])
    except (ValueError, RecursionError) as error:
        return Malformed(line, f"not JSON that can be read ({error})", text[:EXCERPT_CHARACTERS])
    if not isinstance(content, dict):
        return Malformed(line, "not a JSON object", text[:EXCERPT_CHARACTERS])
    absent = [key for key in keys if key not in content]
    if absent:
        return Malformed(line, f"no key {absent[0]!r}", text[:EXCERPT_CHARACTERS])
    return _check_texts(keys, tuple(content[key] for key in keys), line)


def _check_texts(names: tuple[str, ...], values: tuple[object, ...], line: int) -> Document | Malformed:
    texts: list[str] = []
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            return Malformed(line, f"{name!r} is not text but {type(value).__name__}", repr(value)[:EXCERPT_CHARACTERS])
        if not _is_unicode(value):
            return Malformed(line, f"{name!r} holds half a surrogate pair", ascii(value)[:EXCERPT_CHARACTERS])
        texts.append(value)
    return Document(line, tuple(texts))


def _is_unicode(text: str) -> bool:
    """Tell whether a text can be written as UTF-8: JSON escapes can spell one that cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decode_text(content: bytes, line: int) -> Document | Malformed:
    try:
        return Document(line, (content.decode("utf-8"),))
    except UnicodeDecodeError as error:
        bad_line = line + content.count(b"\n", 0, error.start)
        return Malformed(bad_line, f"not UTF-8 (byte 0x{content[error.start]:02x})", _excerpt(content[error.start :]))


def _without_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def _excerpt(raw: bytes) -> str:
    return raw[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
