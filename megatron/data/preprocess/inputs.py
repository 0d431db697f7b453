"""Which files are inputs, what kind each is by its ending, and how its content is opened."""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron.data.errors import DataError, MissingDataError

COMPRESSIONS = (".gz", ".zst")
JSONL_ENDINGS = (".jsonl", ".json", ".ndjson")
PARQUET_ENDINGS = (".parquet",)
TEXT_ENDINGS = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh"),
)


def compression_of(path: str | Path) -> str:
    """Return the ending of a compressed file (`.gz`, `.zst`), or nothing."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def kind_of(path: str | Path) -> str:
    """Tell `jsonl`, `parquet` or `text` by the ending under any compression; an unknown ending is text."""
    ending = _ending(Path(path))
    if ending in JSONL_ENDINGS:
        return "jsonl"
    return "parquet" if ending in PARQUET_ENDINGS else "text"


def _ending(path: Path) -> str:
    return (path.with_suffix("") if compression_of(path) else path).suffix.lower()


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Find the input files, in the order given; those of a folder or a pattern are sorted.

    A folder stands for the files below it with an ending that is known, hidden ones left out. Neither a folder nor a
    pattern stands for what the data tools themselves write (side files, lists of malformed lines, unfinished parts).

    Raises:
        MissingDataError: a file does not exist, or a folder or pattern holds no input.
        DataError: a file is given twice.
    """
    found: list[Path] = []
    for pattern in patterns:
        found.extend(_find(pattern))
    seen: set[Path] = set()
    for path in found:
        if path in seen:
            raise DataError(f"--input names {path} twice: a file is read once.")
        seen.add(path)
    return found


def _find(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        known = JSONL_ENDINGS + PARQUET_ENDINGS + TEXT_ENDINGS
        files = (file for file in path.rglob("*") if _ending(file) in known and file.is_file())
        inputs = sorted(file for file in files if not _is_hidden(file.relative_to(path)) and not _is_own(file))
        if not inputs:
            raise MissingDataError(f"--input {pattern} is a folder without a file that ends in {' '.join(known)}.")
        return inputs
    matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    inputs = [match for match in matches if match.is_file() and not _is_own(match)]
    if not inputs:
        raise MissingDataError(f"--input {pattern} does not exist: give files, folders or quoted patterns.")
    return inputs


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_own(path: Path) -> bool:
    return path.name.endswith((".meta.json", ".errors.jsonl")) or path.parent.suffix == ".parts"


@contextmanager
def open_content(path: str | Path, raw: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Open the content of a file, unpacked where it is compressed.

    Args:
        path: the file; its ending says how it is compressed.
        raw: the open file, for a caller who wants to know how far it was read.

    Raises:
        DataError: a compressed file is cut or damaged, or `.zst` cannot be read here.
    """
    with raw or open(path, "rb") as file:
        compression = compression_of(path)
        if not compression:
            yield file
            return
        try:
            yield _unpack(path, file, compression)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is cut or damaged ({error}): copy it anew from its source.") from error


def _unpack(path: str | Path, file: BinaryIO, compression: str) -> BinaryIO:
    stream: Any = gzip.GzipFile(fileobj=file) if compression == ".gz" else _ZstdStream(path, file)
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))


class _ZstdStream(io.RawIOBase):
    """Content of a `.zst` file, of any number of frames. The library's own reader takes a cut file for a whole one."""

    def __init__(self, path: str | Path, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path} needs the package zstandard: pip install 'megatron-deepspeed[data]'.") from error
        self._file = file
        self._new_frame: Callable[[], Any] = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._error: type[Exception] = zstandard.ZstdError
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._file.read(1 << 16)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self._content = memoryview(self._unpack_some())
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _unpack_some(self) -> bytes:
        self._frame = self._frame or self._new_frame()
        try:
            content: bytes = self._frame.decompress(self._packed)
        except self._error as error:
            raise EOFError(str(error)) from error
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return content
