"""Names in a folder of checkpoints, and the rule that none of them leads anywhere else."""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from megatron.checkpoint.errors import CheckpointError

LATEST = "latest"
MANIFEST = "manifest.json"
TENSORS = "tensors.json"
STATE = "state.json"
CONFIG = "config.json"

NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
STEP = re.compile(r"step_(\d{7,18})")
STAGING = ".*.staging"
"""What a save that is under way, or was killed, is called: a pattern for `glob`."""


def tag_of(iteration: int) -> str:
    """Name of the folder that holds the checkpoint of an iteration."""
    return f"step_{iteration:07d}"


def iteration_of(tag: str) -> int | None:
    """Return the iteration whose checkpoint has this name, or None where it is named otherwise."""
    found = STEP.fullmatch(tag)
    return int(found[1]) if found and tag_of(int(found[1])) == tag else None


def rng_file(rank: int) -> str:
    """Name of the file with the random streams of a rank."""
    return f"rng_{rank:05d}.safetensors"


def hidden_name(tag: str, purpose: str = "") -> str:
    """Make a name that no other save has, not even one of a killed run whose processes still linger."""
    return f".{tag}.{purpose}{secrets.token_hex(4)}.staging"


def is_name(text: object) -> bool:
    """Whether a text is the name of an entry of a folder: short, of harmless characters, not hidden, no path."""
    return isinstance(text, str) and NAME.fullmatch(text) is not None and not text.startswith(".")


def check_name(text: object, where: object) -> str:
    """Return the name of a file as it is.

    Args:
        text: what a file of a checkpoint says.
        where: that file, for the sentence.

    Raises:
        CheckpointError: it is no plain name and may lead out of the folder.
    """
    if not isinstance(text, str) or not is_name(text):
        raise CheckpointError(
            f"{where} names the file {str(text)[:80]!r}: a checkpoint's files have names of at most 128 letters, "
            "digits and ._- within its own folder; load another one"
        )
    return text


def folder_of(root: Path, tag: str) -> Path:
    """Return the folder of a checkpoint by its name.

    Raises:
        CheckpointError: the name is none, there is no such folder, or a link leads out of `root`.
    """
    if not is_name(tag):
        raise CheckpointError(
            f"{tag[:80]!r} is no name of a checkpoint: that has at most 128 letters, digits and ._- and leads nowhere "
            "else"
        )
    folder = root / tag
    if not folder.is_dir():
        there = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}"))
        raise CheckpointError(f"{root} has no checkpoint {tag}; there are: {', '.join(there[-10:]) or 'none'}")
    if folder.resolve().parent != root.resolve():
        raise CheckpointError(f"{folder} is a link that leads out of {root}, from where nothing is loaded")
    return folder


def size_of(path: Path) -> int | None:
    """Size of a regular file in bytes; None where there is none, be it a link or a pipe of that name."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
