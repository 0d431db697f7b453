"""Named points at which a process may be killed, in its own code: before or after a call, or in the middle of it."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable

POINTS = {
    "staging is opened": ("megatron.checkpoint.store", "open_staging", "before"),
    "staging is open": ("megatron.checkpoint.store", "open_staging", "after"),
    "copies are taken": ("megatron.checkpoint.host_copies", "HostCopies.take", "before"),
    "a file is half written": ("megatron.checkpoint.files", "_Hashed.write", "before"),
    "a file is written": ("megatron.checkpoint.files", "_Hashed.finish", "before"),
    "tensors are written": ("megatron.checkpoint.store", "write_fragments", "after"),
    "streams are written": ("megatron.checkpoint.store", "write_streams", "after"),
    "the record is missing": ("megatron.checkpoint.store", "write_record", "before"),
    "the record is written": ("megatron.checkpoint.store", "write_record", "after"),
    "records are waited for": ("megatron.checkpoint.store", "wait_for_records", "before"),
    "all records are there": ("megatron.checkpoint.store", "wait_for_records", "after"),
    "the manifest is missing": ("megatron.checkpoint.commit", "write_manifest", "before"),
    "the manifest is written": ("megatron.checkpoint.commit", "write_manifest", "after"),
    "the folder has no name": ("megatron.checkpoint.commit", "publish", "before"),
    "the folder has its name": ("megatron.checkpoint.commit", "publish", "after"),
    "the folder is read back": ("megatron.checkpoint.commit", "check_written", "after"),
    "the pointer is written": ("pathlib", "Path.replace", "before"),
    "the pointer is moved": ("pathlib", "Path.replace", "after"),
    "old ones are beyond the limit": ("megatron.checkpoint.store", "retain", "before"),
    "an old one has lost its name": ("megatron.checkpoint.retention", "remove", "before"),
    "an old one is half removed": ("megatron.checkpoint.retention", "remove", "within"),
    "old ones are removed": ("megatron.checkpoint.store", "retain", "after"),
    "a step begins": ("tests.faults.toy_run", "ToyEngine.train_step", "before"),
    "a step of training begins": ("megatron.engine.flat", "FlatEngine.train_step", "before"),
    "a step of training ends": ("megatron.engine.flat", "FlatEngine.train_step", "after"),
}
"""Where a name is called from, the name, and whether the process dies before, after or in the middle of the call."""

FIRST_RANK_ONLY = {
    "staging is opened",
    "staging is open",
    "records are waited for",
    "all records are there",
    "the manifest is missing",
    "the manifest is written",
    "the folder has no name",
    "the folder has its name",
    "the folder is read back",
    "the pointer is written",
    "the pointer is moved",
    "old ones are beyond the limit",
    "an old one has lost its name",
    "an old one is half removed",
    "old ones are removed",
}
IN_THE_BACKGROUND_ONLY = {"copies are taken"}
STEPS = {"a step begins", "a step of training begins", "a step of training ends"}


def arm(point: str, calls: int) -> None:
    """Let this process be killed at a point, the `calls`-th time that it comes there."""
    module, name, when = POINTS[point]
    owner = importlib.import_module(module)
    *classes, name = name.split(".")
    for one in classes:
        owner = getattr(owner, one)
    setattr(owner, name, deadly(getattr(owner, name), when, calls))


def deadly(function: Callable[..., object], when: str, calls: int) -> Callable[..., object]:
    left = [calls]

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] == 0 and when == "within":  # it removes files
            os.unlink = deadly(os.unlink, "after", 1)
        result = function(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call
