"""Files that are complete or not there: written beside their place, synced, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def temporary_beside(path: Path) -> Path:
    """Name a file in the folder of `path` that no other live process uses."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make the renames done in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Give a synced temporary file its final name."""
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose content becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, atomically."""
    with atomic_writer(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
