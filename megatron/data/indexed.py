"""Token files: reading and writing Megatron's `.bin/.idx` pairs.

`<prefix>.bin` holds the token ids of all sequences, one after the other; `<prefix>.idx` says where each begins (see
`index_file.py`); `<prefix>.meta.json` says which tokenizer made them (see `meta.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.data.atomic import publish, temporary_beside
from megatron.data.errors import DataError
from megatron.data.index_file import (
    CHECKED_AT_ONCE,
    HEADER,
    OFFSET_TYPE,
    SIZE_TYPE,
    IndexHeader,
    check_documents,
    check_sequences,
    check_side_file,
    check_signs,
    check_tokens_length,
    read_header,
    token_type_code,
)
from megatron.data.meta import DatasetMeta, TokenizerIdentity, fingerprint_pair, index_path, meta_path, tokens_path

LARGEST_UINT16_VOCABULARY = 65500
COPIED_AT_ONCE = 1 << 22
MAX_SEQUENCE_LENGTH = int(np.iinfo(SIZE_TYPE).max)


def smallest_token_type(vocab_size: int) -> np.dtype[Any]:
    """Choose the token type that Megatron's tools use: uint16 below 65500 ids, int32 from there on."""
    return np.dtype("<u2") if vocab_size < LARGEST_UINT16_VOCABULARY else np.dtype("<i4")


class IndexedDataset:
    """The sequences of a `.bin/.idx` pair, mapped into memory.

    As in Megatron, a sequence is what samples are made of; a document may be several sequences (sentences), though
    the tools here write one for each.

    Attributes:
        sizes: int32 [sequences], tokens of each sequence.
        document_indices: int64 [documents + 1], first sequence of each document.
        tokens: [tokens] of `dtype`, all sequences in a row.
        meta: content of the side file, or None.
        fingerprint: sizes and digests of the two files.

    Raises:
        MissingDataError: one of the two files is not there.
        DataError: they are cut, longer, damaged or not of each other. Opening reads the index and 64 blocks of tokens.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        index, tokens = index_path(prefix), tokens_path(prefix)
        header = read_header(index)
        self._map(header)
        self.num_tokens = check_sequences(index, self.sizes, self._offsets, header.token_type)
        check_documents(index, self.document_indices, header.num_sequences)
        check_tokens_length(tokens, index, self.num_tokens, header.token_type)
        self._map_tokens()
        check_signs(tokens, self.tokens)
        self.meta = DatasetMeta.read(prefix)
        self.fingerprint = fingerprint_pair(index, tokens)
        if self.meta is not None:
            check_side_file(self.prefix, self.fingerprint, self.meta.files)

    def _map(self, header: IndexHeader) -> None:
        self.dtype = header.token_type
        content = np.memmap(index_path(self.prefix), mode="r").view(np.ndarray)
        sizes_end = HEADER.size + header.num_sequences * SIZE_TYPE.itemsize
        offsets_end = sizes_end + header.num_sequences * OFFSET_TYPE.itemsize
        self.sizes: npt.NDArray[np.int32] = content[HEADER.size : sizes_end].view(SIZE_TYPE)
        self._offsets: npt.NDArray[np.int64] = content[sizes_end:offsets_end].view(OFFSET_TYPE)
        self.document_indices: npt.NDArray[np.int64] = content[offsets_end:].view(OFFSET_TYPE)

    def _map_tokens(self) -> None:
        self.tokens: npt.NDArray[Any] = np.zeros(0, self.dtype)
        if self.num_tokens:  # an empty file cannot be mapped
            self.tokens = np.memmap(tokens_path(self.prefix), dtype=self.dtype, mode="r").view(np.ndarray)

    def __len__(self) -> int:
        """Count the sequences."""
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def get(self, i: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Tokens [offset, offset + length) of sequence `i`, to its end without `length`: a read-only view, no copy.

        Raises:
            IndexError: they are not inside the sequence.
        """
        size = int(self.sizes[i])
        end = size if length is None else offset + length
        if not 0 <= offset <= end <= size:
            raise IndexError(f"tokens [{offset}, {end}) of sequence {i} of {self.prefix}, which has {size}")
        start = int(self._offsets[i]) // self.dtype.itemsize
        return self.tokens[start + offset : start + end]

    def __getitem__(self, i: int) -> npt.NDArray[Any]:
        """All tokens of sequence `i`: a read-only view."""
        return self.get(i)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process as a name: the files are mapped there, and were checked here."""
        kept = ("prefix", "num_tokens", "meta", "fingerprint")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map(read_header(index_path(self.prefix)))
        self._map_tokens()


class IndexedDatasetWriter:
    """Writes a `.bin/.idx` pair and its side file, in constant memory; all three appear on `finish()` or not at all.

    As a context manager it finishes when the block ends well and leaves nothing when it does not:

        with IndexedDatasetWriter(prefix, smallest_token_type(tokenizer.vocab_size)) as writer:
            writer.tokenizer = TokenizerIdentity(...)
            writer.add_document(ids)

    Attributes:
        tokenizer, made_by: what the side file is to say; may be set until `finish()`.
        num_documents, num_sequences, num_tokens, max_token_id: what was added so far (-1: no tokens).
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: npt.DTypeLike,
        *,
        tokenizer: TokenizerIdentity | None = None,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        token_type_code(dtype)
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokenizer = tokenizer
        self.made_by: Mapping[str, Any] = made_by or {}
        self.num_documents = self.num_sequences = self.num_tokens = 0
        self.max_token_id = -1
        self._highest_id = int(np.iinfo(self.dtype).max)
        self._index, self._tokens = index_path(prefix), tokens_path(prefix)
        self._index.parent.mkdir(parents=True, exist_ok=True)
        self._parts = {
            name: temporary_beside(Path(f"{self.prefix}.{name}")) for name in ("bin", "idx", "sizes", "documents")
        }
        self._token_file: BinaryIO = self._parts["bin"].open("wb", buffering=1 << 20)
        self._size_file: BinaryIO = self._parts["sizes"].open("w+b", buffering=1 << 20)
        self._document_file: BinaryIO = self._parts["documents"].open("w+b", buffering=1 << 20)
        self._document_file.write(np.zeros(1, OFFSET_TYPE).tobytes())

    def add_document(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Add one document as one sequence.

        Raises:
            DataError: an id is negative or larger than the token type holds, or the document is too long.
        """
        self.add_sequence(ids)
        self.end_document()

    def add_sequence(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Add one sequence to the document that `end_document()` will end; errors as in `add_document`."""
        tokens = np.asarray(ids, dtype=None if len(ids) else self.dtype)
        if len(tokens) > MAX_SEQUENCE_LENGTH:
            raise DataError(f"a sequence of {len(tokens)} tokens does not fit {self._index}: split it in documents.")
        self._write_tokens(tokens)
        self._size_file.write(np.array([len(tokens)], SIZE_TYPE).tobytes())
        self.num_sequences += 1

    def end_document(self) -> None:
        """End a document after the sequences added since the last one."""
        self._document_file.write(np.array([self.num_sequences], OFFSET_TYPE).tobytes())
        self.num_documents += 1

    def add_index(self, prefix: str | os.PathLike[str]) -> None:
        """Add all documents of another pair, block by block; its token type may differ.

        Raises:
            DataError: the other pair does not open, or an id does not fit this one's token type.
        """
        other = IndexedDataset(prefix)
        for start in range(0, other.num_tokens, COPIED_AT_ONCE):
            self._write_tokens(other.tokens[start : start + COPIED_AT_ONCE])
        for start in range(0, len(other), COPIED_AT_ONCE):
            self._size_file.write(other.sizes[start : start + COPIED_AT_ONCE].tobytes())
        ends = other.document_indices[1:]
        for start in range(0, len(ends), COPIED_AT_ONCE):
            self._document_file.write((ends[start : start + COPIED_AT_ONCE] + self.num_sequences).tobytes())
        self.num_sequences += len(other)
        self.num_documents += other.num_documents

    def _write_tokens(self, tokens: npt.NDArray[Any]) -> None:
        if len(tokens) == 0:
            return
        if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
            raise DataError(f"{self._tokens} takes rows of integer token ids, not {tokens.ndim}-d {tokens.dtype}.")
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest > self._highest_id:
            raise DataError(
                f"{self._tokens} holds {self.dtype.name} ids, 0 to {self._highest_id}, and was given "
                f"{lowest if lowest < 0 else highest}: choose the token type by the tokenizer's vocabulary size."
            )
        self._token_file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.num_tokens += len(tokens)
        self.max_token_id = max(self.max_token_id, highest)

    def finish(self) -> DatasetMeta:
        """Write the index, sync, and give the three files their names; the `.idx` comes last and completes the pair."""
        try:
            self._write_index()
            for name in ("bin", "idx"):
                with self._parts[name].open("rb") as file:
                    os.fsync(file.fileno())
            meta = DatasetMeta(
                tokenizer=self.tokenizer,
                documents=self.num_documents,
                sequences=self.num_sequences,
                tokens=self.num_tokens,
                max_token_id=self.max_token_id,
                dtype=self.dtype.name,
                files=fingerprint_pair(self._parts["idx"], self._parts["bin"]),
                made_by=dict(self.made_by),
            )
            for old in (self._index, meta_path(self.prefix)):  # no older index may meet the new tokens
                old.unlink(missing_ok=True)
            publish(self._parts["bin"], self._tokens)
            meta.write(self.prefix)
            publish(self._parts["idx"], self._index)
        finally:
            self.abandon()
        return meta

    def _write_index(self) -> None:
        for file in (self._token_file, self._size_file, self._document_file):
            file.flush()
        header = IndexHeader(
            token_type=self.dtype,
            num_sequences=self.num_sequences,
            document_index_length=self.num_documents + 1,
        )
        sizes = np.zeros(0, SIZE_TYPE)
        if self.num_sequences:
            sizes = np.memmap(self._parts["sizes"], dtype=SIZE_TYPE, mode="r").view(np.ndarray)
        with self._parts["idx"].open("wb") as file:
            file.write(header.pack())
            for start in range(0, len(sizes), CHECKED_AT_ONCE):
                file.write(sizes[start : start + CHECKED_AT_ONCE].tobytes())
            written = 0
            for start in range(0, len(sizes), CHECKED_AT_ONCE):
                lengths = sizes[start : start + CHECKED_AT_ONCE].astype(OFFSET_TYPE)
                ends = written + np.cumsum(lengths)
                file.write(((ends - lengths) * self.dtype.itemsize).astype(OFFSET_TYPE).tobytes())
                written = int(ends[-1])
            self._document_file.seek(0)
            while block := self._document_file.read(COPIED_AT_ONCE):
                file.write(block)

    def abandon(self) -> None:
        """Leave nothing behind; does nothing after `finish()`."""
        for file in (self._token_file, self._size_file, self._document_file):
            file.close()
        for part in self._parts.values():
            part.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()
