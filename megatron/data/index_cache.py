"""A folder of computed indices: each is built once for a file system, and the other processes wait for it.

An entry is a folder named by the hash of what it was computed from. It is written under another name and renamed, so
that it is complete or not there. Who builds holds a lock file with its host, process and time inside. Nothing here
needs a process group: processes meet in the file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.errors import UserError
from megatron.data.atomic import publish, sync_folder, temporary_beside
from megatron.data.errors import DataError, DataTimeoutError

DESCRIPTION = "description.json"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class LockHolder:
    """Who builds an entry; `since` in seconds since 1970."""

    host: str
    pid: int
    who: str
    since: float

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.who} (process {self.pid} on {self.host}), which holds it since {when}"

    @property
    def is_here(self) -> bool:
        """Whether the holder ran on this machine."""
        return self.host == os.uname().nodename

    def is_gone(self, timeout_s: float) -> bool:
        """Whether the holder is dead: seen so on this machine, assumed on another after the time-out."""
        if not self.is_here:
            return time.time() - self.since > timeout_s
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # alive, of another user
            return False
        return False


class IndexCache:
    """Computed arrays under `folder`.

    Args:
        folder: where entries are; made when missing.
        timeout_s: seconds to wait for another process to build an entry.
        who: name of this process in the lock file and in messages, as "rank 3".
        note: prints a sentence.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        timeout_s: float = 1800.0,
        who: str = "this process",
        note: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.timeout_s = timeout_s
        self.who = who
        self.note = note

    def load_or_build(
        self, description: Mapping[str, Any], names: Iterable[str], build: Callable[[], Arrays]
    ) -> Arrays:
        """Load the entry of `description`, building it first if no other process does; arrays are mapped, read-only.

        Args:
            description: everything the arrays depend on, as JSON; its hash names the entry.
            names: of the arrays.
            build: computes them.

        Raises:
            DataError: the folder cannot be written, or the entry is damaged.
            DataTimeoutError: another process builds it for too long.
        """
        text = json.dumps(description, sort_keys=True, indent=2)
        entry = self.folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        if not entry.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._build_or_wait(entry, text, build)
            except UserError:
                raise
            except OSError as error:
                raise DataError(
                    f"{self.folder} cannot be written ({error.strerror}), and the sample index {entry.name} is not in "
                    f"it: name a folder that can with --data-cache-path."
                ) from error
        return _load(entry, names)

    def _build_or_wait(self, entry: Path, text: str, build: Callable[[], Arrays]) -> None:
        deadline, pause = time.monotonic() + self.timeout_s, FIRST_PAUSE_S
        lock = entry.with_suffix(".lock")
        while not entry.exists():
            if self._take(lock):
                try:
                    if not entry.exists():  # built between the look and the lock
                        _write(entry, text, build())
                finally:
                    lock.unlink(missing_ok=True)
                return
            self._look_at(lock, entry, out_of_time=time.monotonic() > deadline)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _take(self, lock: Path) -> bool:
        holder = LockHolder(host=os.uname().nodename, pid=os.getpid(), who=self.who, since=time.time())
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(holder), file)
        return True

    def _look_at(self, lock: Path, entry: Path, *, out_of_time: bool) -> None:
        """Take a lock away from a holder that is gone; give up when out of time."""
        content, holder = _read_lock(lock)
        if holder is None:
            return
        if holder.is_gone(self.timeout_s):
            self.note(f"{lock} was left by {holder} and is gone: {self.who} builds the sample index anew.")
            _break(lock, content)
        elif out_of_time:
            raise DataTimeoutError(
                f"{self.who} waited {self.timeout_s / 60:.3g} minutes for the sample index {entry}, built by {holder}: "
                f"look whether that process still works; if not, delete {lock} and start again; if it only needs "
                f"longer, raise --data-cache-timeout-minutes."
            )


def _read_lock(lock: Path) -> tuple[str, LockHolder | None]:
    """Read who holds a lock; None when it was just given back."""
    try:
        content, since = lock.read_text(), lock.stat().st_mtime
    except FileNotFoundError:
        return "", None
    try:
        return content, LockHolder(**json.loads(content))
    except (TypeError, ValueError):  # made this instant and still empty, or its writer died between the two
        return content, LockHolder(host="an unknown host", pid=0, who="a process that wrote no name", since=since)


def _break(lock: Path, content: str) -> None:
    """Remove a lock of this content; of several processes that try, one does."""
    removed = lock.with_suffix(f".broken-{os.uname().nodename}-{os.getpid()}")
    try:
        lock.rename(removed)
    except FileNotFoundError:
        return
    if removed.read_text() != content:  # another process broke it first, and this was its new lock: put it back
        with suppress(FileExistsError):
            os.link(removed, lock)
    removed.unlink(missing_ok=True)


def _write(entry: Path, text: str, arrays: Arrays) -> None:
    temporary = temporary_beside(entry)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        (temporary / DESCRIPTION).write_text(text)
        sync_folder(temporary)
        publish(temporary, entry)
    except OSError:
        if not (entry / DESCRIPTION).exists():  # else a second builder was faster, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(entry: Path, names: Iterable[str]) -> Arrays:
    try:
        return {
            name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in names
        }
    except (OSError, ValueError) as error:
        raise DataError(
            f"the sample index {entry} is damaged ({error}): delete that folder and start again."
        ) from error
