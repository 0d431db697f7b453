r"""The layout of an `.idx` file, and the checks that a `.bin/.idx` pair must pass before a token of it is read.

    9 bytes   b"MMIDIDX\x00\x00"
    uint64    version, 1
    uint8     code of the token type
    uint64    number of sequences n
    uint64    number of entries of the document index, d (the documents plus one)
    int32[n]  tokens of each sequence
    int64[n]  byte offset of each sequence in the .bin
    int64[d]  first sequence of each document, then n

All little-endian and unaligned. It is the format of Megatron-LM and Megatron-DeepSpeed. Their writers lay sequences one
after the other, so every offset follows from the lengths: a pair of which this does not hold is damaged.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError, MissingDataError
from megatron.data.meta import PairFingerprint, index_path, meta_path, tokens_path

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

TOKEN_TYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
"""Type of the tokens by its code in the header. Codes 6 and 7 are floats, which older writers even swapped."""
FLOAT_CODES = (6, 7)

SIZE_TYPE = np.dtype("<i4")
OFFSET_TYPE = np.dtype("<i8")
CHECKED_AT_ONCE = 1 << 21
SIGN_PROBES = 64
SIGN_PROBE_TOKENS = 1024

REMEDY = "copy both files anew from their source, or make them again with tools/preprocess_data.py"


def token_type_code(dtype: npt.DTypeLike) -> int:
    """Return the header's code of a token type.

    Raises:
        DataError: the type is not an integer type of the format.
    """
    for code, token_type in TOKEN_TYPES.items():
        if token_type == np.dtype(dtype):
            return code
    names = ", ".join(token_type.name for token_type in TOKEN_TYPES.values())
    raise DataError(f"tokens cannot be stored as {np.dtype(dtype)}: a .bin file holds one of {names}.")


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """The fixed part of an `.idx` file."""

    token_type: np.dtype[Any]
    num_sequences: int
    document_index_length: int

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole `.idx` file."""
        per_sequence = SIZE_TYPE.itemsize + OFFSET_TYPE.itemsize
        return HEADER.size + self.num_sequences * per_sequence + self.document_index_length * OFFSET_TYPE.itemsize

    def pack(self) -> bytes:
        """Write the header as bytes."""
        code = token_type_code(self.token_type)
        return HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.document_index_length)


def read_header(path: Path) -> IndexHeader:
    """Read and check the header of an `.idx` file, the file's length included.

    Raises:
        MissingDataError: there is no such file.
        DataError: it is not an index of integer tokens, or shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            content = file.read(HEADER.size)
    except FileNotFoundError as error:
        raise MissingDataError(
            f"{path} does not exist: give the prefix of a .bin/.idx pair, that is its path without the ending."
        ) from error
    if content.startswith(LEGACY_MAGIC):
        raise DataError(f"{path} is of the older, non-mapped format (TNTIDX): make it again with --dataset-impl mmap.")
    if not content.startswith(MAGIC):
        raise DataError(f"{path} is not a Megatron index: it does not begin with {MAGIC!r}; {REMEDY}.")
    if len(content) < HEADER.size:
        raise DataError(f"{path} is cut inside its header, after {len(content)} bytes: {REMEDY}.")
    _, version, code, num_sequences, document_index_length = HEADER.unpack(content)
    if version != VERSION:
        raise DataError(f"{path} has version {version}, and only version {VERSION} is known: {REMEDY}.")
    if code not in TOKEN_TYPES:
        kind = "a floating-point type" if code in FLOAT_CODES else "unknown"
        raise DataError(f"{path} has token type code {code}, which is {kind}, and tokens are integers: {REMEDY}.")
    header = IndexHeader(
        token_type=TOKEN_TYPES[code], num_sequences=num_sequences, document_index_length=document_index_length
    )
    _check_index_length(path, header)
    return header


def _check_index_length(path: Path, header: IndexHeader) -> None:
    actual = path.stat().st_size
    if actual == header.file_bytes:
        return
    if actual == header.file_bytes + header.num_sequences:
        raise DataError(f"{path} holds a mode for each sequence (a multimodal index), which is not text: {REMEDY}.")
    state = "cut" if actual < header.file_bytes else "too long"
    raise DataError(
        f"{path} is {state}: its header promises {header.num_sequences} sequences and {header.file_bytes} bytes, "
        f"and it has {actual}; {REMEDY}."
    )


def check_sequences(
    path: Path, sizes: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], token_type: np.dtype[Any]
) -> int:
    """Check that lengths are not negative and that offsets follow from them; returns the sum of the lengths.

    Raises:
        DataError: at the first sequence of which this does not hold.
    """
    num_tokens = 0
    for start in range(0, len(sizes), CHECKED_AT_ONCE):
        lengths = sizes[start : start + CHECKED_AT_ONCE].astype(np.int64)
        if lengths.min() < 0:
            bad = start + int(np.argmax(lengths < 0))
            raise DataError(f"{path} gives sequence {bad} a negative length, {sizes[bad]}: {REMEDY}.")
        ends = num_tokens + np.cumsum(lengths)
        wrong = offsets[start : start + CHECKED_AT_ONCE] != (ends - lengths) * token_type.itemsize
        if wrong.any():
            bad = start + int(np.argmax(wrong))
            raise DataError(
                f"{path} lets sequence {bad} begin at byte {offsets[bad]}, and after the sequences before it, of "
                f"{token_type.name} tokens, it begins at {int((ends - lengths)[bad - start]) * token_type.itemsize}: "
                f"{REMEDY}."
            )
        num_tokens = int(ends[-1])
    return num_tokens


def check_documents(path: Path, document_index: npt.NDArray[np.int64], num_sequences: int) -> None:
    """Check that the document index goes from 0 to the number of sequences and never back.

    Raises:
        DataError: it does not.
    """
    if len(document_index) == 0 or document_index[0] != 0 or document_index[-1] != num_sequences:
        raise DataError(f"{path} has a document index that does not go from 0 to {num_sequences} sequences: {REMEDY}.")
    for start in range(0, len(document_index) - 1, CHECKED_AT_ONCE):
        steps = np.diff(document_index[start : start + CHECKED_AT_ONCE + 1])
        if steps.min() < 0:
            bad = start + int(np.argmax(steps < 0))
            raise DataError(f"{path} has a document index that goes back after document {bad}: {REMEDY}.")


def check_tokens_length(tokens: Path, index: Path, num_tokens: int, token_type: np.dtype[Any]) -> None:
    """Check that the `.bin` file has exactly the tokens that the index counts.

    Raises:
        MissingDataError: there is no `.bin` file.
        DataError: it is shorter or longer.
    """
    try:
        actual = tokens.stat().st_size
    except FileNotFoundError as error:
        raise MissingDataError(f"{tokens} does not exist, and {index} does: {REMEDY}.") from error
    expected = num_tokens * token_type.itemsize
    if actual != expected:
        state = "cut, or belongs to another index" if actual < expected else "longer than its index says"
        raise DataError(
            f"{tokens} is {state}: {index} counts {num_tokens} {token_type.name} tokens, {expected} bytes, "
            f"and the file has {actual}; {REMEDY}."
        )


def check_signs(path: Path, tokens: npt.NDArray[Any]) -> None:
    """Probe evenly spaced tokens of a signed type for negative ids: the sign of a re-typed or foreign file.

    Raises:
        DataError: a probed id is negative.
    """
    if tokens.dtype.kind != "i" or len(tokens) == 0:
        return
    last_start = max(len(tokens) - SIGN_PROBE_TOKENS, 0)
    for probe in range(SIGN_PROBES):
        start = last_start * probe // (SIGN_PROBES - 1)
        lowest = tokens[start : start + SIGN_PROBE_TOKENS].min()
        if lowest < 0:
            raise DataError(
                f"{path} holds the token id {lowest} near token {start}, and ids are never negative: its index names "
                f"the wrong token type, or belongs to another file; {REMEDY}."
            )
        if last_start == 0:
            return


def check_side_file(prefix: str, found: PairFingerprint, expected: PairFingerprint) -> None:
    """Check a pair against the sizes and digests of its side file.

    Raises:
        DataError: the side file was written for other files.
    """
    if found == expected:
        return
    index_is_same = (found.idx_bytes, found.idx_sha256) == (expected.idx_bytes, expected.idx_sha256)
    stranger = tokens_path(prefix) if index_is_same else index_path(prefix)
    raise DataError(
        f"{stranger} is not the file that {meta_path(prefix)} was written for (its size or content differs): {REMEDY}; "
        f"if the pair is right and the side file is left over from another, delete the side file."
    )
