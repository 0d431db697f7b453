"""Where the host's time goes between two reports. Nothing here waits for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Sums of host seconds by name. A report reads and clears them.

    Work that was only queued on the device costs its launch here; the step as a whole is timed between two reports,
    where the loss is read and the host has waited for the device anyway.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        self._excluded = 0.0

    @contextmanager
    def measure(self, name: str, *, part_of_step: bool = True) -> Iterator[None]:
        """Add the time of the block to `name`; one that is no part of a step is left out of `elapsed`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            if not part_of_step:
                self._excluded += seconds

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds of steps since the last call (evaluations and saves left out), and the sums by name; clears both."""
        now = time.perf_counter()
        elapsed = now - self._since - self._excluded
        seconds = self._seconds
        self._seconds, self._since, self._excluded = {}, now, 0.0
        return elapsed, seconds
