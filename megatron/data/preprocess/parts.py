"""The folder of finished parts, `<output-prefix>.parts/`: what a run that was killed leaves to the next one.

plan.json                 what the parts were made from; another plan does not take them over
lock                      held while a run works here
00000000.<key>.bin/.idx   the documents of shard 0, for each key
00000000.errors.jsonl     its malformed lines, where there are any
00000000.json             its record, written last: the part is complete
00000000.input            unpacked content of a compressed input, until its part is complete
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.data.atomic import write_json
from megatron.data.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What one part holds.

    `first_start` is where the shard's first piece begins in its file, `lines` how many lines the shard has: together
    they give the line numbers of the shards that follow in the same file. `empty` counts texts that gave no token,
    `tokens` is for each key.
    """

    input_bytes: int
    first_start: int
    lines: int
    malformed: int
    empty: int
    tokens: list[int]


@dataclass(frozen=True)
class PartFolder:
    """Names in the folder, and what is written there."""

    path: Path

    def part(self, number: int, key: str) -> Path:
        """Prefix of the pair of one shard and key."""
        return self.path / f"{number:08d}.{key}"

    def errors(self, number: int) -> Path:
        """File of the malformed lines of one shard."""
        return self.path / f"{number:08d}.errors.jsonl"

    def _record(self, number: int) -> Path:
        return self.path / f"{number:08d}.json"

    def is_done(self, number: int) -> bool:
        """Tell whether the part of a shard is complete."""
        return self._record(number).exists()

    def write_record(self, number: int, record: PartRecord) -> None:
        """Declare the part of a shard complete."""
        write_json(self._record(number), asdict(record))

    def read_record(self, number: int) -> PartRecord:
        """Read the record of a complete part."""
        return PartRecord(**json.loads(self._record(number).read_bytes()))

    def is_there(self) -> bool:
        """Tell whether a run has left parts here."""
        return (self.path / "plan.json").exists()

    def start(self, plan: dict[str, Any]) -> None:
        """Take over the parts of an earlier run of the same plan, or begin with none; clear away what is half done.

        Raises:
            DataError: there are parts of another plan.
        """
        plan_file = self.path / "plan.json"
        if plan_file.exists():
            earlier = json.loads(plan_file.read_bytes())
            changed = sorted(name for name in plan if plan[name] != earlier.get(name))
            if changed:
                raise DataError(
                    f"{self.path} holds an unfinished run that differs in: {', '.join(changed)}; give its flags to "
                    "go on with it, or --overwrite to begin anew."
                )
        for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("*.input")):
            leftover.unlink(missing_ok=True)
        write_json(plan_file, plan)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, which is made where it is missing, so that two runs do not write the same output.

        Raises:
            DataError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"{self.path} is in use by another run: wait for it, or choose another prefix."
                ) from error
            yield

    def clear(self) -> None:
        """Remove all parts, but neither the folder nor its lock; the plan goes last, as it is the sign of a run."""
        for file in sorted(self.path.iterdir(), key=lambda file: file.name == "plan.json"):
            if file.name != "lock":
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        self.clear()
        shutil.rmtree(self.path, ignore_errors=True)
