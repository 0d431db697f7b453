"""What a run waits for until its first step is done."""

from __future__ import annotations

import time
from collections.abc import Callable


class StartUp:
    """Seconds from the start of a process to the end of its first step, by what they went into.

    Args:
        began: when the process began, as `clock` tells it; None: now.
        part: what the time since then went into.
        clock: tells seconds.
    """

    def __init__(self, began: float | None, part: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.began = self._last = clock() if began is None else began
        self._seconds: dict[str, float] = {}
        self.passed(part)

    def passed(self, part: str) -> None:
        """Count the time since the last call as that of `part`."""
        now = self._clock()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """Say the parts in the order in which they came."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._seconds.items())
        return f" start: the first step was done after {self._last - self.began:.1f} s ({parts})"
