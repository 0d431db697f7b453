"""A clock of the host that runs for the length of `with` blocks."""

from __future__ import annotations

import time
from types import TracebackType


class Stopwatch:
    """Sums up the seconds of its `with` blocks, which do not nest. Nothing here waits for the device."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._started
