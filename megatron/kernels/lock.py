"""A lock between the processes of one host, which names who holds it and ends with the process that does."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
SAY_AFTER_SECONDS = 5.0


@contextmanager
def host_lock(folder: Path, name: str, purpose: str) -> Iterator[None]:
    """Hold the lock `name` of this host within the context; a process that waits says for whom.

    The lock is the kernel's, on an open file: whoever dies holding it leaves nothing behind, and the next one takes
    over. Hosts that share a folder have locks of their own.

    Args:
        folder: where the file is kept; made if it is missing.
        name: of what is locked.
        purpose: what the holder does, for the messages of those who wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.{socket.gethostname()}.lock").open("a+") as file:
        _wait_for(file.fileno(), folder, lambda: describe_owner(Path(file.name)))
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "purpose": purpose}, file)
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()
            fcntl.flock(file, fcntl.LOCK_UN)


def describe_owner(path: Path) -> str:
    """Say who holds the lock at `path`, as far as its file tells."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        since = time.strftime("%H:%M:%S", time.localtime(owner["since"]))
        return f"process {owner['pid']} on {owner['host']}, which has been {owner['purpose']} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _wait_for(descriptor: int, folder: Path, owner: object) -> None:
    started, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not said and time.monotonic() - started > SAY_AFTER_SECONDS:
                said = True
                log.warning("waiting in %s for %s", folder, owner() if callable(owner) else owner)
            time.sleep(POLL_SECONDS)
