"""What a run prints: plain lines that `grep` finds by Megatron's names, or a live line on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol, TextIO

Record = Mapping[str, Any]


def train_line(record: Record, total_iterations: int | None) -> str:
    """One report of training as one line."""
    total = "" if total_iterations is None else f"/{total_iterations:8d}"
    parts = [
        f" iteration {record['iteration']:8d}{total}",
        f"consumed samples: {record['consumed_samples']:12d}",
        f"consumed tokens: {record['consumed_tokens']:14d}",
        f"elapsed time per iteration (ms): {record['elapsed_ms_per_step']:.1f}",
        f"host overhead (ms): {overhead_text(record['timers_ms'])}",
        f"learning rate: {record['learning_rate']:.6E}",
        f"global batch size: {record['global_batch_size']:5d}",
        f"lm loss: {number(record['lm_loss'], '.6E')}",
        f"loss scale: {record['loss_scale']:.1f}",
        f"grad norm: {number(record['grad_norm'], '.3f')}",
        *([f"params norm: {number(record['params_norm'], '.3f')}"] if "params_norm" in record else []),
        f"number of skipped iterations: {record['skipped_steps']:3d}",
        f"number of nan iterations: {record['nonfinite_steps']:3d}",
        *speed_parts(record),
        f"memory: {record['memory_gib']:.2f} GiB",
        f"ETA: {duration(record['eta_seconds'])}",
    ]
    return " | ".join(parts) + " |"


def overhead_text(timers: Mapping[str, float]) -> str:
    """Tell what the loop costs the host in a step, and the two waits in it: for data, and for the ranks to agree."""
    waits = ", ".join(f"{name} {timers.get(name, 0.0):.2f}" for name in ("data", "agreement"))
    return f"{timers['overhead']:.2f}, {waits}"


def speed_parts(record: Record) -> list[str]:
    """Tokens/s, TFLOP/s of one device as model and as hardware count them, and MFU where the peak is known."""
    mfu = record["mfu"]
    return [
        f"tokens/s: {record['tokens_per_second']:.0f}",
        f"TFLOP/s/GPU: {record['model_tflops']:.4g} model, {record['hardware_tflops']:.4g} hardware",
        f"MFU: {'unknown' if mfu is None else f'{mfu:.1%}'}",
    ]


def evaluation_line(record: Record) -> str:
    """One evaluation as one line."""
    return (
        f" {record['split']} loss at iteration {record['iteration']} | "
        f"lm loss value: {number(record['lm_loss'], '.6E')} | lm loss PPL: {number(record['perplexity'], '.6E')} | "
        f"tokens: {record['tokens']} |"
    )


def number(value: float | None, form: str) -> str:
    """Format a number; `nan` for one that is not there."""
    return format(math.nan if value is None else value, form)


def duration(seconds: float | None) -> str:
    """`1 day, 2:03:04`, or `unknown`."""
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))


class Console(Protocol):
    """Where a person reads."""

    def train(self, record: Record) -> None:
        """Show a report of training."""

    def evaluation(self, record: Record) -> None:
        """Show an evaluation."""

    def say(self, text: str) -> None:
        """Show a sentence."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainConsole:
    """One line for each report."""

    def __init__(self, total_iterations: int | None, stream: TextIO | None = None) -> None:
        self._total = total_iterations
        self._stream = stream or sys.stdout

    def train(self, record: Record) -> None:
        """Print the report."""
        self.say(train_line(record, self._total))

    def evaluation(self, record: Record) -> None:
        """Print the evaluation."""
        self.say(evaluation_line(record))

    def say(self, text: str) -> None:
        """Print the sentence."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class LiveConsole:
    """A line at the bottom of the terminal that each report rewrites; evaluations and sentences stay above it."""

    def __init__(self, total_iterations: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            auto_refresh=False,
        )
        self._task = self._progress.add_task("training", total=total_iterations, summary="starting")
        self._progress.start()

    def train(self, record: Record) -> None:
        """Rewrite the line."""
        summary = " · ".join(
            [
                f"[bold]loss {number(record['lm_loss'], '.4f')}[/]",
                f"lr {record['learning_rate']:.3g}",
                f"norm {number(record['grad_norm'], '.2f')}",
                *speed_parts(record),
                f"{record['elapsed_ms_per_step']:.0f} ms/step",
                *([f"[red]{record['nonfinite_steps']} nan[/]"] if record["nonfinite_steps"] else []),
                f"ETA {duration(record['eta_seconds'])}",
            ]
        )
        self._progress.update(self._task, completed=record["iteration"], summary=summary)
        self._progress.refresh()

    def evaluation(self, record: Record) -> None:
        """Print the evaluation above the line."""
        self.say(evaluation_line(record))

    def say(self, text: str) -> None:
        """Print the sentence above the line."""
        self._progress.console.print(text, markup=False, highlight=False)
        self._progress.refresh()

    def close(self) -> None:
        """Leave the last line where it is."""
        self._progress.stop()


def build_console(progress: str, total_iterations: int | None) -> Console:
    """Make the console that `--progress` asks for; `auto` is live on a terminal."""
    if progress == "live" or (progress == "auto" and sys.stdout.isatty()):
        return LiveConsole(total_iterations)
    return PlainConsole(total_iterations)
