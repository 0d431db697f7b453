"""Which checkpoint a run resumes: one that all ranks together have found whole, before anything of it is parsed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import Digest
from megatron.checkpoint.manifest import read_manifest, share_of, wrong_bytes, wrong_sizes
from megatron.checkpoint.names import CONFIG, LATEST, MANIFEST, STATE, folder_of, tag_of
from megatron.checkpoint.ranks import Ranks
from megatron.checkpoint.retention import steps_in

LONGEST_POINTER = 4096


def find_checkpoint(root: Path, ranks: Ranks, warn: Callable[[str], None], tag: str | None = None) -> Path | None:
    """Return the checkpoint to resume, verified by all ranks together, or None where there is none at all.

    The one that `latest` names comes first, then the others from the newest; `root` may also be a checkpoint itself.
    `warn` is told of each that is passed over, on the first rank.

    Args:
        root: the folder of checkpoints, the same for all ranks.
        ranks: all call this, and all get the same answer.
        warn: prints a sentence.
        tag: the one to take, whatever `latest` says; no other one takes its place.

    Raises:
        CheckpointError: there are checkpoints, and none is whole; or the named one is not.
    """
    paths, problem = ranks.of_first(_listed(root, tag, warn) if ranks.is_first else None)
    if problem is not None:
        raise CheckpointError(problem)
    passed_over: list[str] = []
    for path in map(Path, paths):
        problem = problem_of(path, ranks)
        if problem is None:
            if passed_over and ranks.is_first:
                warn(f"the newest whole checkpoint of {root} is {path.name}: that one is resumed")
            return path
        passed_over.append(f"{path} is not resumed: {problem}")
        if tag is None and ranks.is_first:
            warn(passed_over[-1])
    if tag is not None:
        raise CheckpointError(f"{passed_over[0]}; give another --load-tag, or none to take the newest that is whole")
    if paths:
        raise CheckpointError(f"no checkpoint in {root} is whole: give --load another folder, or train from scratch")
    return None


def candidates(root: Path, warn: Callable[[str], None]) -> list[Path]:
    """List the checkpoints of a folder, whole or not, the one to resume first: that of `latest`, then the newest.

    Raises:
        CheckpointError: `latest` is there and no checkpoint is.
    """
    if (root / MANIFEST).is_file():
        return [root]
    others = [root / tag_of(iteration) for iteration in reversed(steps_in(root))]
    if not others and not os.path.lexists(root / LATEST):
        return []
    pointed = _pointed(root, warn)
    if not others and pointed is None:
        raise CheckpointError(f"{root} has {root / LATEST} and no checkpoint: give --load another folder")
    if pointed is not None and others and pointed != others[0]:
        warn(f"{root / LATEST} names {pointed.name}, though {others[0].name} is there: taking {pointed.name}")
    return ([pointed] if pointed else []) + [path for path in others if path != pointed]


def refuse_foreign(root: Path, resumed: Path | None, ranks: Ranks) -> None:
    """Keep a run from writing among the checkpoints of another one.

    Raises:
        CheckpointError: `root` holds checkpoints, and the run resumes none of them.
    """
    present = ranks.of_first(steps_in(root) if ranks.is_first else None)
    if present and (resumed is None or resumed.resolve().parent != root.resolve()):
        raise CheckpointError(
            f"--save {root} holds checkpoints of another run, up to iteration {present[-1]}: add --load {root} to "
            "continue it, or give another folder"
        )


def problem_of(path: Path, ranks: Ranks) -> str | None:
    """Say what is wrong with a checkpoint, the same on all ranks, each of which reads its share of the files."""
    files, problem = ranks.of_first(_expected(path) if ranks.is_first else None)
    if problem is not None:
        return str(problem)
    found = [one for some in ranks.gather(_wrong_share(path, files, ranks)) for one in some]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if found[3:] else "") if found else None


def _wrong_share(path: Path, files: dict[str, Digest], ranks: Ranks) -> list[str]:
    try:
        return wrong_bytes(path, files, share_of(files, ranks.rank, ranks.size))
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        return [f"rank {ranks.rank} cannot read it ({type(error).__name__}: {error})"]


def _expected(path: Path) -> tuple[dict[str, Digest], str | None]:
    """Read the manifest, and say what a look at the names and sizes finds wrong."""
    try:
        files = read_manifest(path)
        missing = [f"{name} is not in its {MANIFEST}" for name in (STATE, CONFIG) if name not in files]
        problems = missing + wrong_sizes(path, files)
    except (CheckpointError, OSError) as error:
        return {}, str(error)
    return files, "; ".join(problems[:3]) or None


def _listed(root: Path, tag: str | None, warn: Callable[[str], None]) -> tuple[list[str], str | None]:
    """List what may be resumed, the best first; and why it cannot be listed."""
    try:
        paths = candidates(root, warn) if tag is None else [folder_of(root, tag)]
    except (CheckpointError, OSError) as error:
        return [], str(error)
    return [str(path) for path in paths], None


def _pointed(root: Path, warn: Callable[[str], None]) -> Path | None:
    """Follow `latest`; the scan of the folder decides when it names no checkpoint."""
    pointer = root / LATEST
    try:
        content = _read_pointer(pointer)
        folder = folder_of(root, content.decode("ascii").removesuffix("\n"))
    except (OSError, ValueError, CheckpointError) as error:
        warn(f"{pointer} names no checkpoint ({error}): taking the newest of the folder")
        return None
    if not content.endswith(b"\n"):
        warn(f"{pointer} does not end its line and may have been cut: taking {folder.name}")
    return folder


def _read_pointer(pointer: Path) -> bytes:
    """Read a small regular file, and wait for nothing that is none, such as a pipe."""
    descriptor = os.open(pointer, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LONGEST_POINTER:
            raise OSError("it is no small regular file")
        return os.read(descriptor, LONGEST_POINTER)
    finally:
        os.close(descriptor)
