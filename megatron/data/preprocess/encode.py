"""What a worker does: one shard's documents into one part, a `.bin/.idx` pair for each key, and a record of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from megatron.config.data import DataConfig
from megatron.data.atomic import atomic_writer
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDatasetWriter, smallest_token_type
from megatron.data.preprocess.documents import Document, Malformed, Piece, PieceReader, ReadingRules
from megatron.data.preprocess.parts import PartFolder, PartRecord
from megatron.data.preprocess.shards import Shard, lines_before
from megatron.data.tokenizer.build import build_tokenizer
from megatron.data.tokenizer.interface import Tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024


class MalformedInputError(DataError):
    """A line is no document, and the run is to stop at the first such."""


def malformed_sentence(path: str, line: int, reason: str) -> str:
    """Say where a malformed line is and what to do about it."""
    return f"{path}:{line}: {reason}; put it right, or pass over such lines with --on-error skip."


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """What a worker needs to know: pickled to it once."""

    folder: PartFolder
    tokenizer: DataConfig
    rules: ReadingRules
    append_eod: bool
    stop_on_error: bool


def start_encoder(settings: EncodingSettings) -> partial[PartRecord]:
    """Build the tokenizer of a worker; returns the function that encodes a shard."""
    return partial(encode_shard, settings, build_tokenizer(settings.tokenizer))


def encode_shard(settings: EncodingSettings, tokenizer: Tokenizer, shard: Shard) -> PartRecord:
    """Write the part of a shard, its record last, so that a part with a record is complete.

    Raises:
        MalformedInputError: a line is no document, and the settings say to stop.
        DataError: a file cannot be read.
    """
    dtype = smallest_token_type(tokenizer.vocab_size)
    errors = settings.folder.errors(shard.number)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedDatasetWriter(settings.folder.part(shard.number, key), dtype))
            for key in settings.rules.keys
        ]
        part = _Part(settings, tokenizer, writers, lambda: stack.enter_context(atomic_writer(errors)))
        for piece in shard.pieces:
            part.add_piece(piece)
    record = PartRecord(
        input_bytes=shard.input_bytes,
        first_start=shard.pieces[0].start,
        lines=part.lines,
        malformed=part.malformed,
        empty=part.empty,
        tokens=[writer.num_tokens for writer in writers],
    )
    settings.folder.write_record(shard.number, record)
    for piece in shard.pieces:
        if piece.unpacked:
            Path(piece.unpacked).unlink(missing_ok=True)
    return record


@dataclass
class _Part:
    """The part in work."""

    settings: EncodingSettings
    tokenizer: Tokenizer
    writers: list[IndexedDatasetWriter]
    open_errors: Callable[[], BinaryIO]
    lines: int = 0
    malformed: int = 0
    empty: int = 0
    _batch: list[Document] = field(default_factory=list)
    _errors: BinaryIO | None = None

    def add_piece(self, piece: Piece) -> None:
        reader = PieceReader(piece, self.settings.rules)
        characters = 0
        for document in reader:
            if isinstance(document, Malformed):
                self._refuse(piece, document)
                continue
            self._batch.append(document)
            characters += sum(map(len, document.texts))
            if characters >= BATCH_CHARACTERS or len(self._batch) >= BATCH_DOCUMENTS:
                self._write_batch(piece)
                characters = 0
        self._write_batch(piece)
        self.lines += reader.lines

    def _refuse(self, piece: Piece, malformed: Malformed) -> None:
        if self.settings.stop_on_error:
            line = malformed.line + lines_before(piece)
            raise MalformedInputError(malformed_sentence(piece.path, line, malformed.reason))
        self.malformed += 1
        entry = {"file": piece.path, "line": malformed.line, "reason": malformed.reason, "begins": malformed.excerpt}
        self._errors = self._errors or self.open_errors()
        self._errors.write((json.dumps(entry) + "\n").encode())

    def _write_batch(self, piece: Piece) -> None:
        batch, self._batch = self._batch, []
        for ids_by_key in self._encode(piece, batch):
            for writer, ids in zip(self.writers, ids_by_key, strict=True):
                if not ids:
                    self.empty += 1
                    continue
                if self.settings.append_eod:
                    ids.append(self.tokenizer.eod_id)
                writer.add_document(ids)

    def _encode(self, piece: Piece, batch: list[Document]) -> Iterator[tuple[list[int], ...]]:
        try:
            columns = [
                self.tokenizer.encode_batch(texts)
                for texts in zip(*(document.texts for document in batch), strict=True)
            ]
        except ValueError as error:
            if len(batch) > 1:  # find the document that has no ids
                for document in batch:
                    yield from self._encode(piece, [document])
            else:
                self._refuse(piece, Malformed(batch[0].line, str(error), batch[0].texts[0][:80]))
            return
        yield from zip(*columns, strict=True)
