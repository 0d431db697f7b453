"""Whether a save has room, on the disk and on the host, before anything of it is written."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.errors import CheckpointError

GIB = 2**30
OVERHEAD_PER_RANK = 2**16
OVERHEAD_PER_FRAGMENT = 512
"""Bytes of random streams and of JSON, generously."""


@dataclass(frozen=True)
class Need:
    """What one rank needs for a save, in bytes.

    Attributes:
        disk: of its files.
        memory: on its host, for copies that are not there yet.
        available: memory that its host can give.
        host: its name.
    """

    disk: int
    memory: int
    available: int | None
    host: str


def need_of(num_bytes: int, num_fragments: int, memory: int) -> Need:
    """Say what this rank needs to save so many bytes, with so much more memory than it has."""
    disk = num_bytes + OVERHEAD_PER_RANK + OVERHEAD_PER_FRAGMENT * num_fragments
    return Need(disk=disk, memory=memory, available=available_memory() if memory else None, host=socket.gethostname())


def check_memory(needs: Sequence[Need]) -> None:
    """Refuse copies that a host has no room for. Every rank, given the needs of all, decides alike.

    Raises:
        CheckpointError: names the first such host, with what it needs and has.
    """
    for host in sorted({need.host for need in needs}):
        there = [need for need in needs if need.host == host]
        needed = sum(need.memory for need in there)
        available = min((need.available for need in there if need.available is not None), default=None)
        if available is not None and needed > available:
            raise CheckpointError(
                f"--async-save copies {needed / GIB:.2f} GiB to the memory of {host}, which has {available / GIB:.2f} "
                f"GiB left for its {len(there)} ranks: save without it, or use more hosts"
            )


def check_disk(root: Path, needs: Sequence[Need]) -> None:
    """Refuse a save that does not fit on the disk.

    Raises:
        CheckpointError: names the folder, with what is needed and free there.
    """
    needed, free = sum(need.disk for need in needs), shutil.disk_usage(root).free
    if needed > free:
        raise CheckpointError(
            f"the checkpoint needs {needed / GIB:.3f} GiB and {root} has {free / GIB:.3f} GiB free: make room there or "
            "give --save another folder, and resume from the last checkpoint, which is as it was"
        )


def available_memory() -> int | None:
    """Bytes that this host, or the container that holds the process, can still give; None where neither tells."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        cgroup = Path("/sys/fs/cgroup")
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((cgroup / "memory.current").read_text(encoding="ascii")))
    return min(found, default=None)


def free_space(folder: Path) -> str:
    """Say how much is free on a disk, or why that cannot be said."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free there"
    except OSError as error:
        return str(error)
