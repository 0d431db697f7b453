"""Checkpoints that are complete or not there: the commit protocol, and the choice of what to resume.

    <save>/latest                      the tag to resume, replaced last
    <save>/step_0000010/manifest.json  size and SHA-256 of every other file: the mark of a complete checkpoint
                        state.json     counters, layout, engine   config.json    the sections of the run
                        tensors.json   where tensors lie          tensors_00000_00.safetensors   those of a rank
                        rng_00000.pt   random streams of a rank
    <save>/.step_0000020.staging/      a save that is under way, or was killed

Everything is written and synced in the staging folder, which is then renamed. A process killed at any moment leaves
the last complete checkpoint and its pointer as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import TENSORS, Fragment, describe_tensors, write_fragments
from megatron.training.control import Control
from megatron.training.state import TrainState

TAG = re.compile(r"[A-Za-z0-9._-]{1,128}")
LATEST, MANIFEST, STATE, CONFIG = "latest", "manifest.json", "state.json", "config.json"
HASHING_THREADS = 4


class Streams(Protocol):
    """Random streams, as tensors and numbers."""

    def state_dict(self) -> dict[str, Any]:
        """Give the state of every stream."""


class Saves(Protocol):
    """What is asked of an engine here."""

    def state_fragments(self) -> Iterator[Fragment]:
        """Give what this rank writes of the logical tensors."""

    def state(self) -> dict[str, Any]:
        """Give what else it keeps, JSON."""


def tag_of(iteration: int) -> str:
    """Name of the folder that holds the checkpoint of an iteration."""
    return f"step_{iteration:07d}"


def rng_file(rank: int) -> str:
    """Name of the file with the random streams of a rank."""
    return f"rng_{rank:05d}.pt"


class CheckpointWriter:
    """Writes a run's checkpoints. Every rank has one, and all save together.

    Args:
        root: the folder of `--save`.
        config: the sections of the run, JSON.
        layout: how the ranks share the state, JSON.
        control: the ranks.
        streams: this rank's random streams.
        keep_last: complete checkpoints to keep; 0 keeps all.
    """

    def __init__(
        self,
        root: Path,
        *,
        config: Mapping[str, Any],
        layout: Mapping[str, Any],
        control: Control,
        streams: Streams,
        keep_last: int = 0,
    ) -> None:
        self._root = root
        self._config = config
        self._layout = layout
        self._control = control
        self._streams = streams
        self._keep_last = keep_last

    def save(self, engine: Saves, state: TrainState) -> Path:
        """Write a checkpoint, point `latest` to it, then remove the oldest; returns its folder.

        Raises:
            CheckpointError: it cannot be written; the last one is as it was.
        """
        target = self._root / tag_of(state.iteration)
        try:
            self._save(engine, state, target)
        except CheckpointError:
            raise
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError about positions
            raise CheckpointError(
                f"rank {self._control.rank} cannot write the checkpoint {target} ({_free(self._root)}): "
                f"{str(error).splitlines()[0]}; make room there or give --save another folder, and resume from the "
                "last checkpoint, which is as it was"
            ) from error
        return target

    def _save(self, engine: Saves, state: TrainState, target: Path) -> None:
        control = self._control
        staging = self._root / f".{target.name}.staging"
        if control.is_first:
            self._root.mkdir(parents=True, exist_ok=True)
            for leftover in self._root.glob(".*.staging"):
                shutil.rmtree(leftover)
            staging.mkdir()
        control.barrier()
        records, _ = write_fragments(staging, control.rank, engine.state_fragments())
        described = [record for share in control.gather(records) for record in share]
        with open(staging / rng_file(control.rank), "wb") as file:
            torch.save(self._streams.state_dict(), file)
            _sync(file)
        if control.is_first:
            write_json(staging / TENSORS, describe_tensors(described))
            write_json(staging / STATE, {"counters": state.to_json(), **self._layout, "engine": engine.state()})
            write_json(staging / CONFIG, self._config)
        control.barrier()
        files = _shared_digests(staging, sorted(_files(staging)), control)
        if control.is_first:
            write_json(staging / MANIFEST, {"version": 1, "files": files})
            _commit(self._root, staging, target)
            _prune(self._root, self._keep_last, spare=target)
        control.barrier()


def refuse_foreign(root: Path, resumed: Path | None, control: Control) -> None:
    """Keep a run from writing among the checkpoints of another one.

    Raises:
        CheckpointError: `root` holds checkpoints, and the run resumes none of them.
    """
    present = control.of_first(iterations_in(root) if control.is_first else None)
    if present and (resumed is None or resumed.resolve().parent != root.resolve()):
        raise CheckpointError(
            f"--save {root} holds checkpoints of another run, up to iteration {present[-1]}: add --load {root} to "
            "continue it, or give another folder"
        )


def find_checkpoint(root: Path, control: Control, warn: Callable[[str], None]) -> Path | None:
    """Return the checkpoint to resume, verified by all ranks together, or None where there is none at all.

    The one that `latest` names comes first, then the others from the newest; `root` may also be a checkpoint itself.
    `warn` is told of each that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    candidates = control.of_first([str(path) for path in _candidates(root, warn)] if control.is_first else None)
    for path in map(Path, candidates):
        problem = _problem(path, control)
        if problem is None:
            return path
        if control.is_first:
            warn(f"{path} is not resumed: {problem}")
    if candidates:
        raise CheckpointError(f"no checkpoint in {root} is whole: give --load another folder, or train from scratch")
    return None


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says besides the engine's files."""

    state: dict[str, Any]
    config: dict[str, Any]


def read_checkpoint(path: Path) -> Loaded:
    """Read the JSON files of a checkpoint that was found whole."""
    return Loaded(state=read_json(path / STATE), config=read_json(path / CONFIG))


def read_streams(path: Path, rank: int) -> dict[str, Any]:
    """Read the random streams that a rank saved. Runs no code from the file."""
    streams: dict[str, Any] = torch.load(path / rng_file(rank), map_location="cpu", weights_only=True)
    return streams


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file and sync it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        _sync(file)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is missing or none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): the checkpoint is damaged, resume another one"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: the checkpoint is damaged, load another")
    return value


def iterations_in(root: Path) -> list[int]:
    """List the iterations whose checkpoint in `root` is marked complete, ascending."""
    names = (path.name for path in root.glob("step_*") if (path / MANIFEST).is_file())
    return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))


def _commit(root: Path, staging: Path, target: Path) -> None:
    """Rename the finished folder and move the pointer, each synced before the next."""
    for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
        _sync_folder(folder)
    if target.exists():
        _discard(target)
    staging.rename(target)
    _sync_folder(root)
    pointer = root / f".{LATEST}.new"
    with open(pointer, "w", encoding="utf-8") as file:
        file.write(f"{target.name}\n")
        _sync(file)
    pointer.replace(root / LATEST)
    _sync_folder(root)


def _prune(root: Path, keep_last: int, spare: Path) -> None:
    old = iterations_in(root)[:-keep_last] if keep_last else []
    for iteration in old:
        if tag_of(iteration) != spare.name:
            _discard(root / tag_of(iteration))


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no folder that looks like one."""
    doomed = path.with_name(f".{path.name}.removed.staging")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _candidates(root: Path, warn: Callable[[str], None]) -> list[Path]:
    if (root / MANIFEST).is_file():
        return [root]
    others = [root / tag_of(iteration) for iteration in reversed(iterations_in(root))]
    pointed = _pointed(root, warn) if others or (root / LATEST).exists() else None
    return ([pointed] if pointed else []) + [path for path in others if path != pointed]


def _pointed(root: Path, warn: Callable[[str], None]) -> Path | None:
    """Follow `latest`; the scan of the folder decides when it names no checkpoint."""
    try:
        tag = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        warn(f"{root / LATEST} cannot be read ({error}): taking the newest checkpoint of the folder")
        return None
    if tag.startswith(".") or not TAG.fullmatch(tag) or not (root / tag).is_dir():
        warn(f"{root / LATEST} says {tag[:80]!r}, which is no checkpoint there: taking the newest of the folder")
        return None
    return root / tag


def _problem(path: Path, control: Control) -> str | None:
    """Say what is wrong with a checkpoint; the ranks look together, each hashing its share of the files."""
    expected: dict[str, dict[str, Any]]
    expected, problem = control.of_first(_expected_files(path) if control.is_first else None)
    if problem is not None:
        return problem
    found: dict[str, dict[str, Any]] = {}
    try:
        found = _digests(path, sorted(expected)[control.rank :: control.size])
    except OSError as error:
        problem = f"{error}"
    for name, digest in found.items():
        if digest != expected[name]:
            problem = f"{name} does not have the SHA-256 of its manifest: the file is damaged"
    return next((one for one in control.gather(problem) if one is not None), None)


def _expected_files(path: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Read the manifest, and say what a look at the sizes finds wrong."""
    try:
        files = read_json(path / MANIFEST)["files"]
        for name, digest in files.items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != digest["bytes"]:
                return {}, f"{name} has {'no' if size is None else size} bytes instead of {digest['bytes']}"
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        return {}, f"its {MANIFEST} is missing or damaged ({error})"
    return files, None


def _shared_digests(folder: Path, names: list[str], control: Control) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, each rank reading its share."""
    shares = control.gather(_digests(folder, names[control.rank :: control.size]))
    return {name: digest for share in shares for name, digest in share.items()}


def _digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    names = list(names)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free there"
    except OSError as error:
        return str(error)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
