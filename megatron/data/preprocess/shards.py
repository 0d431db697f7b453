"""Cuts inputs into shards: runs of whole documents that are encoded on their own.

Where the cuts are depends on the inputs alone, so that a shard that a killed run has finished is a shard of the next
run. Small files are gathered into a shard and never cut. A large file is cut: JSON lines and text at the ends of lines
(or at blank lines), Parquet at its row groups. A large compressed file is unpacked shard by shard, since nobody can
begin to read in its middle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron.data.preprocess.documents import Piece, ReadingRules, open_parquet
from megatron.data.preprocess.inputs import compression_of, kind_of, open_content

SMALLEST_SHARD = 1 << 20
LARGEST_SHARD = 1 << 26
USUAL_SHARDS = 256
COPIED_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One unit of work: either whole files, or one piece of one file. `input_bytes` are those on disk."""

    number: int
    pieces: tuple[Piece, ...]
    input_bytes: int


def shard_bytes_for(total_bytes: int) -> int:
    """Choose how large a shard is: about 256 of them, of 1 to 64 MiB each."""
    return min(max(total_bytes // USUAL_SHARDS, SMALLEST_SHARD), LARGEST_SHARD)


class ShardPlanner:
    """Iterates over the shards of the inputs, in order.

    Args:
        inputs: the files.
        rules: what a document is, and so where a file may be cut.
        shard_bytes: how large a shard is at least, except the last.
        unpack_folder: where pieces of compressed files are put; who encodes a piece deletes it.
        is_done: tells that a shard need not be unpacked any more.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        rules: ReadingRules,
        shard_bytes: int,
        unpack_folder: Path,
        is_done: Callable[[int], bool],
    ) -> None:
        self._inputs = inputs
        self._rules = rules
        self._shard_bytes = shard_bytes
        self._unpack_folder = unpack_folder
        self._is_done = is_done
        self._number = 0

    def __iter__(self) -> Iterator[Shard]:
        self._number = 0
        gathered: list[Piece] = []
        gathered_bytes = 0
        for path in self._inputs:
            size = path.stat().st_size
            cut = size > self._shard_bytes and self._can_be_cut(path)
            if gathered and (cut or gathered_bytes >= self._shard_bytes):
                yield self._shard(gathered, gathered_bytes)
                gathered, gathered_bytes = [], 0
            if cut:
                yield from self._cut(path, size)
            else:
                gathered.append(Piece(path=str(path)))
                gathered_bytes += size
        if gathered:
            yield self._shard(gathered, gathered_bytes)

    def _can_be_cut(self, path: Path) -> bool:
        return kind_of(path) != "text" or self._rules.text_document != "file"

    def _cut(self, path: Path, size: int) -> Iterator[Shard]:
        if kind_of(path) == "parquet":
            return self._cut_parquet(path, size)
        return self._cut_compressed(path, size) if compression_of(path) else self._cut_lines(path, size)

    def _cut_lines(self, path: Path, size: int) -> Iterator[Shard]:
        start = 0
        with path.open("rb") as file:
            while start < size:
                end = size
                if start + self._shard_bytes < size:
                    file.seek(start + self._shard_bytes)
                    end = file.tell() + sum(map(len, self._rest_of_document(file, path)))
                yield self._shard([Piece(path=str(path), start=start, end=end)], end - start)
                start = end

    def _cut_compressed(self, path: Path, size: int) -> Iterator[Shard]:
        start, packed_start = 0, 0
        with path.open("rb") as packed, open_content(path, packed) as content:
            while content.peek(1):  # type: ignore[attr-defined]
                done = self._is_done(self._number)
                unpacked = self._unpack_folder / f"{self._number:08d}.input"
                end = start + self._unpack_one(content, path, os.devnull if done else unpacked)
                packed_end = packed.tell() if content.peek(1) else size  # type: ignore[attr-defined]
                piece = Piece(path=str(path), start=start, end=end, unpacked=str(unpacked))
                yield self._shard([piece], packed_end - packed_start)
                start, packed_start = end, packed_end

    def _unpack_one(self, content: BinaryIO, path: Path, target: str | Path) -> int:
        """Copy the next shard's content to `target`; returns its bytes."""
        copied = 0
        with open(target, "wb") as file:
            while copied < self._shard_bytes:
                block = content.read(min(COPIED_AT_ONCE, self._shard_bytes - copied))
                if not block:
                    return copied
                copied += file.write(block)
            for line in self._rest_of_document(content, path):
                copied += file.write(line)
        return copied

    def _rest_of_document(self, file: BinaryIO, path: Path) -> Iterator[bytes]:
        """Read what is left of the document that `file` stands in, line by line."""
        by_blank_line = kind_of(path) == "text" and self._rules.text_document == "blank-line"
        yield file.readline()
        while by_blank_line and (line := file.readline()):
            yield line
            if line.isspace():
                return

    def _cut_parquet(self, path: Path, size: int) -> Iterator[Shard]:
        metadata = open_parquet(path).metadata
        start, gathered, read = 0, 0, 0
        for group in range(metadata.num_row_groups):
            gathered += metadata.row_group(group).num_rows * size // max(metadata.num_rows, 1)
            last = group == metadata.num_row_groups - 1
            if gathered < self._shard_bytes and not last:
                continue
            gathered = size - read if last else gathered
            yield self._shard([Piece(path=str(path), start=start, end=group + 1)], gathered)
            start, read, gathered = group + 1, read + gathered, 0

    def _shard(self, pieces: list[Piece], input_bytes: int) -> Shard:
        self._number += 1
        return Shard(number=self._number - 1, pieces=tuple(pieces), input_bytes=input_bytes)


def lines_before(piece: Piece) -> int:
    """Count the lines (rows) of a file that come before a piece of it."""
    if piece.start == 0:
        return 0
    if kind_of(piece.path) == "parquet":
        metadata = open_parquet(piece.path).metadata
        return sum(metadata.row_group(group).num_rows for group in range(piece.start))
    lines, left = 0, piece.start
    with open_content(piece.path) as content:
        while left and (block := content.read(min(left, COPIED_AT_ONCE))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
