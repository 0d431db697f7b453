"""What each rank leaves in the staging folder for the first one: that it lives, and then what it has written.

    .step_0000020.3f9c1a2b.staging/rank_00003.alive   touched every second while rank 3 writes
                                   rank_00003.json    its files and fragments, or its error: written last, renamed

No rank has to be asked: the first one's thread waits for these files while all of them train.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import DIGEST, Digest, read_json, sync_folder, write_json
from megatron.checkpoint.schema import OBJECT, TEXT, Entries, Items, Named, Nullable

BEAT_SECONDS = 1.0
SILENT_SECONDS = 120.0
"""How long a rank's sign of life may stay as it is; file systems over a network show it up to a minute late."""

HURRIED_SECONDS = 4.0
"""The same when the run ends with an error, likely because that rank is gone."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.01, 0.5
"""Between two looks at the folder, in seconds; it grows."""

RECORD_FILE = Entries({"error": Nullable(TEXT), "files": Named(DIGEST), "tensors": Items(OBJECT)}, closed=True)


@dataclass(frozen=True)
class Part:
    """What one rank has written: its files, and the fragments in them as JSON records."""

    files: Mapping[str, Digest]
    tensors: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def record_file(rank: int) -> str:
    """Name of a rank's record."""
    return f"rank_{rank:05d}.json"


def alive_file(rank: int) -> str:
    """Name of a rank's sign of life."""
    return f"rank_{rank:05d}.alive"


def write_record(staging: Path, rank: int, part: Part | None, error: str | None = None) -> None:
    """Say that a rank has written its part, or why it could not; the record is there whole or not at all.

    After that nothing of the folder may be touched: the first rank gives it another name.
    """
    content: dict[str, Any] = {"error": error, "files": {}, "tensors": []}
    if part is not None:
        content["files"] = {name: vars(digest) for name, digest in part.files.items()}
        content["tensors"] = list(part.tensors)
    new = staging / f"{record_file(rank)}.new"
    write_json(new, content)
    sync_folder(staging)
    new.rename(staging / record_file(rank))


def read_record(staging: Path, rank: int) -> Part:
    """Read what a rank has written.

    Raises:
        CheckpointError: it could not write.
    """
    content = read_json(staging / record_file(rank), RECORD_FILE)
    if content["error"] is not None:
        raise CheckpointError(content["error"])
    return Part({name: Digest(**digest) for name, digest in content["files"].items()}, content["tensors"])


def remove_records(staging: Path) -> None:
    """Remove what only the first rank needed."""
    for path in staging.glob("rank_*"):
        path.unlink(missing_ok=True)


class Heartbeat:
    """Shows in the staging folder that this rank lives, while in its `with` block."""

    def __init__(self, staging: Path, rank: int) -> None:
        self._path = staging / alive_file(rank)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="checkpoint heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        with contextlib.suppress(OSError):  # on a full disk: the rank is to tell of that itself, if it can
            self._path.touch()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the folder may be gone, or the disk away for a while
                os.utime(self._path)


def wait_for_records(
    staging: Path, ranks: Iterable[int], time_limit: float, hurried: threading.Event | None = None
) -> list[Part]:
    """Wait until each of the ranks has written its record; returns what they wrote, in the order of ranks.

    Args:
        staging: the folder that they write into.
        ranks: whose records are waited for.
        time_limit: seconds for all.
        hurried: once it is set, because the run ends with an error, a rank without a sign of life is soon given up.

    Raises:
        CheckpointError: ranks could not write, died, or took longer than `time_limit` seconds.
    """
    watches = [_Watch(staging, rank) for rank in ranks]
    waiting, problems = list(watches), []
    deadline, pause = time.monotonic() + time_limit, SHORTEST_PAUSE
    while waiting:
        silence = HURRIED_SECONDS if hurried is not None and hurried.is_set() else SILENT_SECONDS
        names = set(os.listdir(staging))  # one question to the file system, however many ranks there are
        dead = [watch for watch in waiting if watch.is_dead(names, silence)]
        problems += [f"rank {watch.rank} died while it wrote" for watch in dead]
        waiting = [watch for watch in waiting if watch not in dead and watch.record.name not in names]
        if waiting and time.monotonic() > deadline:
            problems.append(f"ranks {[watch.rank for watch in waiting]} did not finish within {time_limit:g} s")
            break
        if waiting:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    parts = []
    for watch in watches:
        if watch.record.exists():
            try:
                parts.append(read_record(staging, watch.rank))
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems))
    return parts


class _Watch:
    """What the first rank sees of another one, by its own clock: those of two hosts may differ."""

    def __init__(self, staging: Path, rank: int) -> None:
        self.rank = rank
        self.record = staging / record_file(rank)
        self._alive = staging / alive_file(rank)
        self._seen: int | None = None
        self._since = time.monotonic()

    def is_dead(self, names: set[str], silence: float) -> bool:
        if self.record.name in names:
            return False
        beat = self._beat() if self._alive.name in names else None
        if beat is None and self._seen is not None:
            return not self.record.exists()  # the sign of life is taken away after the record is there, if it comes
        if beat != self._seen:
            self._seen, self._since = beat, time.monotonic()
        return time.monotonic() - self._since > silence

    def _beat(self) -> int | None:
        try:
            return self._alive.stat().st_mtime_ns
        except OSError:
            return None
