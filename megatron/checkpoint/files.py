"""The two kinds of files in a checkpoint, JSON and safetensors: hashed while they are written, synced, without code.

The safetensors format (huggingface.co/docs/safetensors): eight bytes with the length of the header, a JSON header that
names each tensor's dtype, shape and place, then the tensors' bytes one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.schema import COUNT, OBJECT, TEXT, Entries, Shape, require

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the dtypes in a header."""

ALIGNMENT = 8
"""The tensors' bytes start at a multiple of this, so that a reader may map them into memory."""

CHUNK_BYTES = 16 * 2**20
"""Bytes hashed and written at once: they are in the processor's cache still when they are written."""


@dataclass(frozen=True)
class Digest:
    """What a whole file has: its size and the SHA-256 of its bytes, in hexadecimal."""

    bytes: int
    sha256: str


DIGEST = Entries({"bytes": COUNT, "sha256": TEXT}, closed=True)
"""A digest in JSON."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Digest:
    """Write a safetensors file and sync it; on a device or on the host, one tensor at a time is copied.

    Args:
        path: the file; one that is there is replaced.
        tensors: by key, of any shape.
        metadata: strings for the header.

    Raises:
        CheckpointError: a dtype that the format does not have.
        OSError: it cannot be written; what is there of it is no whole file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{key} has the dtype {tensor.dtype}, which {path} cannot hold")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        hashed.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for chunk in _chunks(tensor):
                hashed.write(chunk)
        return hashed.finish()


def write_json(path: Path, value: Mapping[str, Any]) -> Digest:
    """Write a JSON object and sync it."""
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        hashed.write((json.dumps(value, indent=1) + "\n").encode())
        return hashed.finish()


def read_json(path: Path, shape: Shape = OBJECT) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        shape: what it must be; what comes back is that.

    Raises:
        CheckpointError: it is missing or no JSON; or names the first entry that is not what it must be.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): the checkpoint is damaged, load another one"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: the checkpoint is damaged, load another one")
    require(value, shape, path)
    return value


def digest_of(path: Path) -> Digest:
    """Read a file for its size and SHA-256."""
    with open(path, "rb") as file:
        return Digest(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's entries on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Hashed:
    """A file that is written once, from the start, and hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self._file.write(data)
        self._bytes += len(data)

    def finish(self) -> Digest:
        self._file.flush()
        os.fsync(self._file.fileno())
        return Digest(bytes=self._bytes, sha256=self._sha256.hexdigest())


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Give a tensor's bytes, row-major, little-endian, without a second copy of those on the host."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    data: memoryview = flat.numpy().data
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]
