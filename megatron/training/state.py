"""What changes while a run trains: a handful of counters, plain JSON both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["iterations", "samples", "tokens"]


@dataclass
class TrainState:
    """Counters of one run. Everything else that a step needs is a pure function of these and of the config."""

    iteration: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    """Steps whose update the engine left out (overflow, non-finite gradient)."""
    nonfinite_steps: int = 0
    """Steps whose loss or gradient was NaN or infinite."""
    nonfinite_streak: int = 0
    """Non-finite steps in a row, up to the last step."""

    def advance(self, *, samples: int, tokens: int) -> None:
        """Account for one step that consumed so many samples and tokens."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens

    def progress(self, unit: Unit) -> int:
        """Count what was consumed so far in `unit`."""
        return {
            "iterations": self.iteration,
            "samples": self.consumed_samples,
            "tokens": self.consumed_tokens,
        }[unit]

    def to_json(self) -> dict[str, int]:
        """Return the counters as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        """Read what `to_json` gave.

        Raises:
            ValueError: a counter is missing, unknown or not a non-negative integer.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"the state has the counters {sorted(values)} instead of {sorted(names)}")
        for name, value in values.items():
            if type(value) is not int or value < 0:
                raise ValueError(f"the state's {name} is {value!r} instead of a count")
        return cls(**values)
