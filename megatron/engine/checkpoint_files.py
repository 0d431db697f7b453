"""How DeepSpeed's checkpoint files are written and read: whole or not at all, and without running what is in them."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.checkpoint.errors import CheckpointError

ALLOWED_CLASSES = [DynamicLossScaler, LossScaler, fragment_address]
"""All that DeepSpeed's files hold beside tensors, numbers, strings and their containers."""


class CheckpointFiles(CheckpointEngine):
    """Takes the place of DeepSpeed's own checkpoint engine, which writes in place and unpickles anything."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "synced files"

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing is prepared."""

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        """Write one file; after a crash it is there whole or not there."""
        write_file(state_dict, Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file.

        Raises:
            CheckpointError: it is missing or damaged, or holds objects of other classes.
        """
        return read_file(Path(path), map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Put the names of the files on disk, after their contents."""
        sync_directory(Path(info.save_dir) / info.tag)
        return True


def write_file(content: Any, path: Path) -> None:
    """Save under a temporary name, flush to disk, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(_without_enums(content), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _without_enums(content: Any) -> Any:
    """Put plain numbers for the members of number enums, in dicts, lists and tuples.

    DeepSpeed saves its ZeRO stage as one. Python 3.11.2 (Debian 12) pickles it as a call of `getattr`, which no reader
    that runs no code can allow.
    """
    if isinstance(content, enum.Enum) and isinstance(content, int):
        return int(content)
    if type(content) is dict:
        return {key: _without_enums(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_without_enums(value) for value in content)
    return content


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Load what `write_file` saved; a file with any other class in it is refused before it can run code.

    Args:
        path: the file.
        map_location: where its tensors go, as for `torch.load`.
        mmap: leave its tensors on disk until they are read.

    Raises:
        CheckpointError: the file is missing or damaged, or holds objects of other classes.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, or of another layout") from None
    except Exception as error:  # torch raises many kinds for damaged files, among them RuntimeError and EOFError
        raise CheckpointError(f"{path} is not a readable checkpoint file: {error}; take another checkpoint") from error
