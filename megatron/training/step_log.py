"""What each step of a run came to, bit for bit, on disk: with it a resumed run proves that it does the same.

    {"start": 0, "run": {...}}     a process begins after iteration 0, and says what its numbers depend on
    {"iteration": 1, "loss": "0x1.0a...", "grad_norm": "0x1.9c..."}

A process that begins after iteration 10 makes what others wrote of later ones void: their run ended there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from megatron.checkpoint.schema import BITS, COUNT, OBJECT, Entries, fits

STEPS = "steps.jsonl"
KEPT_STEPS = 10_000
"""Steps that stay, about a megabyte; up to twice as many are in the file."""

START = Entries({"start": COUNT, "run": OBJECT})
STEP = Entries({"iteration": COUNT, "loss": BITS, "grad_norm": BITS}, closed=True)


@dataclass(frozen=True)
class StepNumbers:
    """Mean loss and gradient norm of a step as hexadecimal floats, which hold every bit."""

    loss: str
    grad_norm: str

    @classmethod
    def of(cls, loss: float, grad_norm: float) -> StepNumbers:
        """Write numbers of a step."""
        return cls(loss.hex(), grad_norm.hex())


@dataclass(frozen=True)
class RecordedSteps:
    """Consecutive steps that one process did after a checkpoint, by iteration.

    Attributes:
        run: what the process said of itself.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[int, StepNumbers] = field(default_factory=dict)


class StepLog:
    """Appends the steps of this process; a failure to write is told once and costs nothing else.

    Each line goes to the operating system at once, so that a process that is killed loses none; one that is cut is
    passed over when it is read.

    Args:
        path: the file.
        start: iteration after which this process begins.
        run: what its numbers depend on, JSON.
        warn: told of a failure.
    """

    def __init__(self, path: Path, start: int, run: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._path = path
        self._opening = {"start": start, "run": run}
        self._warn = warn
        self._file: IO[bytes] | None = None
        self._lines = 0
        self._failed = False

    def write(self, iteration: int, numbers: StepNumbers) -> None:
        """Append a step. The first one opens the file: a process that does none makes nothing void."""
        if self._failed:
            return
        line = {"iteration": iteration, "loss": numbers.loss, "grad_norm": numbers.grad_norm}
        try:
            if self._file is None:
                self._open()
                self._append(self._opening)
            elif self._lines >= 2 * KEPT_STEPS:
                self._open()
            self._append(line)
        except OSError as error:
            self._failed = True
            self._warn(f"{self._path} gets no more steps of this run, which --verify-resume reads: {error}")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._lines += 1

    def _open(self) -> None:
        """Open the file behind its last whole line, shortened when it has grown long."""
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        records = list(_records(self._path))
        if len(records) >= 2 * KEPT_STEPS:
            kept = records[-KEPT_STEPS:]
            opening = next((record for record in reversed(records[:-KEPT_STEPS]) if "start" in record), None)
            records = kept if opening is None or "start" in kept[0] else [opening, *kept]
            new = self._path.with_name(f".{self._path.name}.new")
            new.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
            new.replace(self._path)
        self._lines = len(records)
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 - open for the whole run
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")


def read_steps(path: Path, iteration: int) -> RecordedSteps:
    """Read the steps after `iteration` that the run which was there went on to do; none where there is no such file."""
    run: Mapping[str, Any] = {}
    found: dict[int, tuple[Mapping[str, Any], StepNumbers]] = {}
    for record in _records(path):
        if "start" in record:
            run = record["run"]
            found = {step: entry for step, entry in found.items() if step <= record["start"]}
        else:
            found[record["iteration"]] = (run, StepNumbers(record["loss"], record["grad_norm"]))
    if iteration + 1 not in found:
        return RecordedSteps()
    run = found[iteration + 1][0]
    steps = takewhile(lambda step: step in found and found[step][0] is run, range(iteration + 1, max(found) + 1))
    return RecordedSteps(run, {step: found[step][1] for step in steps})


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Give the whole lines of the file, and pass over what is none."""
    try:
        text = path.read_bytes()
    except OSError:
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if fits(record, START) or fits(record, STEP):
            yield record
