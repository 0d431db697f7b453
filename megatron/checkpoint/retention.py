"""Which checkpoints stay when there is a new one."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import sync_folder
from megatron.checkpoint.manifest import read_manifest, wrong_sizes
from megatron.checkpoint.names import STAGING, hidden_name, iteration_of, tag_of


def steps_in(root: Path) -> list[int]:
    """List the iterations that have a folder of a checkpoint in `root`, whole or not, ascending; a link is none."""
    folders = (path for path in root.glob("step_*") if path.is_dir() and not path.is_symlink())
    return sorted(iteration for path in folders if (iteration := iteration_of(path.name)) is not None)


def retain(root: Path, newest: int, *, keep_last: int, keep_every: int) -> list[int]:
    """Remove what is beyond the limits; returns the iterations that are gone.

    Args:
        root: the folder of checkpoints.
        newest: the iteration that was saved just now; it stays.
        keep_last: how many stay; 0 keeps all. Those that were saved beyond `newest`, by a run that was taken back to
            an earlier one, go before those that led to it, and damaged ones go first.
        keep_every: multiples of this stay for ever; 0 is none.
    """
    if not keep_last:
        return []

    def worth(iteration: int) -> tuple[bool, bool, int]:
        return _is_whole(root / tag_of(iteration)), iteration <= newest, iteration

    others = sorted((iteration for iteration in steps_in(root) if iteration != newest), key=worth, reverse=True)
    doomed = [step for step in others[keep_last - 1 :] if not (keep_every and step % keep_every == 0)]
    for iteration in sorted(doomed):
        discard(root / tag_of(iteration))
    return sorted(doomed)


def discard(folder: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no folder that looks like one."""
    doomed = folder.with_name(hidden_name(folder.name, "removed."))
    folder.rename(doomed)
    sync_folder(folder.parent)
    remove(doomed)


def remove(folder: Path) -> None:
    """Remove a hidden folder as far as it goes; what a lingering process adds meanwhile is removed at the next save."""
    shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Remove what killed saves and removals have left."""
    for leftover in root.glob(STAGING):
        remove(leftover)


def _is_whole(folder: Path) -> bool:
    try:
        return not wrong_sizes(folder, read_manifest(folder))
    except CheckpointError:
        return False
