"""Progress of a long job over bytes: a live line on a terminal, now and then a plain line in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Tells how far a job is, how fast, and how long it will still take; on standard error.

    Args:
        total_bytes: of all inputs, on disk.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._bytes = self._skipped = self._tokens = 0
        self._started = self._told = time.monotonic()
        self._live: Any = None

    def skip(self, input_bytes: int) -> None:
        """Count work that an earlier run has finished: it does not enter the rates."""
        self._skipped += input_bytes
        self._bytes += input_bytes

    def advance(self, input_bytes: int, tokens: int) -> None:
        """Count finished work."""
        self._bytes += input_bytes
        self._tokens += tokens
        if self._live is not None:
            self._live.update(self._task, completed=self._bytes, told=self.describe())
        elif time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            print(self.describe(), file=sys.stderr, flush=True)

    def describe(self) -> str:
        """Say the state in one line."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self._bytes - self._skipped) / seconds
        left = _clock((self._total - self._bytes) / rate) if rate else "unknown time"
        share = self._bytes / self._total if self._total else 1.0
        return (
            f"{self._bytes / 1e6:.1f} of {self._total / 1e6:.1f} MB ({share:.0%}), {self._tokens / 1e6:.2f} M tokens, "
            f"{self._tokens / seconds:,.0f} tokens/s, {rate / 1e6:.2f} MB/s, {left} left"
        )

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as LiveProgress

            columns = (BarColumn(bar_width=24), TextColumn("{task.fields[told]}"))
            self._live = LiveProgress(*columns, console=Console(stderr=True))
            self._live.start()
            self._task = self._live.add_task("", total=self._total, completed=self._bytes, told=self.describe())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None:
            print(self.describe(), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
