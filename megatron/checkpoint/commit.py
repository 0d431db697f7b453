"""The commit of a checkpoint: everything is written and synced in a hidden folder, which then gets its name.

A process killed, or a power supply cut, at any moment leaves the last complete checkpoint and the pointer to it. The
order, each on the disk before the next:

1. the files of all ranks, and the names of these files;
2. tensors.json, state.json, config.json; manifest.json, the mark of a complete checkpoint; their names;
3. the folder's own name: one rename;
4. what is on the disk is held against the manifest;
5. `latest`, by a rename over the one before;
6. only now are old checkpoints removed (`megatron.checkpoint.retention`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import Digest, sync_folder, write_json
from megatron.checkpoint.fragments import describe_tensors
from megatron.checkpoint.manifest import read_manifest, unlisted, write_manifest, wrong_sizes
from megatron.checkpoint.names import CONFIG, LATEST, STATE, TENSORS, hidden_name
from megatron.checkpoint.records import remove_records
from megatron.checkpoint.retention import clear_leftovers, discard, remove


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a checkpoint is to hold besides the files that are in the staging folder already.

    Attributes:
        files: those, with their digests.
        tensors: the records of all fragments in them.
        state: counters, layout and the engine's state, JSON.
        config: the sections of the run, JSON.
    """

    files: Mapping[str, Digest]
    tensors: Sequence[Mapping[str, Any]]
    state: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)


def open_root(root: Path) -> None:
    """Make the folder of checkpoints where it is missing, and clear what killed saves have left there."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)
    clear_leftovers(root)


def open_staging(root: Path, tag: str) -> Path:
    """Make the hidden folder into which a checkpoint is written.

    Its name is new each time, so that what lingers of a killed run cannot write into the next one's.
    """
    open_root(root)
    staging = root / hidden_name(tag)
    staging.mkdir()
    return staging


def commit(root: Path, staging: Path, tag: str, content: Content) -> Path:
    """Make a checkpoint of a staging folder whose files are written and synced, and point `latest` to it.

    Returns:
        the folder of the checkpoint.

    Raises:
        CheckpointError: entries of a tensor are missing, or the disk does not hold what was written.
        OSError: it cannot be written; the staging folder is left to `remove`.
    """
    files = dict(content.files)
    files[TENSORS] = write_json(staging / TENSORS, describe_tensors(content.tensors))
    files[STATE] = write_json(staging / STATE, content.state)
    files[CONFIG] = write_json(staging / CONFIG, content.config)
    remove_records(staging)
    write_manifest(staging, files)
    sync_folder(staging)
    target = root / tag
    publish(staging, target)
    try:
        check_written(target, files)
    except CheckpointError:
        discard(target)
        raise
    point(root, tag)
    return target


def publish(staging: Path, target: Path) -> None:
    """Give the finished folder its name; a checkpoint of the same name goes only when the new one is there."""
    before = target.with_name(hidden_name(target.name, "replaced.")) if target.exists() else None
    if before is not None:
        target.rename(before)
    staging.rename(target)
    sync_folder(target.parent)
    if before is not None:
        remove(before)


def check_written(target: Path, files: Mapping[str, Digest]) -> None:
    """Read back from the disk what a checkpoint has.

    Raises:
        CheckpointError: it is not what was written.
    """
    problems = wrong_sizes(target, files) + [f"{name} is not one of its files" for name in unlisted(target, files)]
    if read_manifest(target) != files:
        problems.append("its manifest is another one")
    if problems:
        raise CheckpointError(f"{target} was written and reads back otherwise: {'; '.join(problems[:3])}")


def point(root: Path, tag: str) -> None:
    """Let `latest` name a checkpoint."""
    new = root / f".{LATEST}.new"
    with open(new, "w", encoding="ascii") as file:
        file.write(f"{tag}\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(root / LATEST)
    sync_folder(root)
