"""Draw the curves of one or several runs: `python tools/plot_run.py --output curves.png RUN/metrics.jsonl ...`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.errors import UserError, tell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("lm_loss", "loss (nats per token)"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
)

Record = dict[str, Any]


@dataclass
class Run:
    """The reports of one run by iteration; of an iteration that was done twice, the later one."""

    name: str
    train: dict[int, Record] = field(default_factory=dict)
    validation: dict[int, Record] = field(default_factory=dict)
    broken_lines: int = 0

    def curve(self, reports: dict[int, Record], key: str) -> tuple[list[int], list[float]]:
        """Give iterations and values of one number, ascending, without reports that lack it."""
        points = [(iteration, reports[iteration].get(key)) for iteration in sorted(reports)]
        known = [(iteration, value) for iteration, value in points if value is not None]
        return [iteration for iteration, _ in known], [value for _, value in known]


def main(argv: Sequence[str] | None = None) -> int:
    """Summarise and draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="metrics.jsonl files, or folders that hold one")
    parser.add_argument("--output", type=Path, metavar="PNG", help="picture to write (default: the summary alone)")
    parser.add_argument("--tokens", action="store_true", help="plot over consumed tokens instead of iterations")
    arguments = parser.parse_args(argv)
    try:
        runs = [read_run(path) for path in arguments.runs]
        print("\n".join(summary(runs)))
        if arguments.output is not None:
            draw(runs, arguments.output, over_tokens=arguments.tokens)
            print(f"wrote {arguments.output}")
    except UserError as error:
        tell(error, rank=0)
        return 2
    return 0


def read_run(path: Path) -> Run:
    """Read the metrics file of a run; a line cut by a kill is counted and left out.

    Raises:
        UserError: the file cannot be read, or holds no report.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; give a run's metrics.jsonl, or its --save folder") from error
    run = Run(name=str(path))
    for line in lines:
        try:
            record = json.loads(line)
            _sort_in(run, record)
        except (ValueError, KeyError, TypeError):
            run.broken_lines += 1
    if not run.train and not run.validation:
        raise UserError(f"{file} holds no report of a run: give the metrics.jsonl of a run that got to its first one")
    return run


def _sort_in(run: Run, record: Record) -> None:
    if record["kind"] == "train":
        run.train[record["iteration"]] = record
    elif record["kind"] == "evaluation" and record["split"] == "validation":
        run.validation[record["iteration"]] = record


def summary(runs: Iterable[Run]) -> list[str]:
    """Write a table, one run a line."""
    rows = [("run", "iterations", "loss first", "last", "lowest valid", "at", "tokens/s", "nan", "broken lines")]
    for run in runs:
        iterations, losses = run.curve(run.train, "lm_loss")
        evaluated, valid = run.curve(run.validation, "lm_loss")
        best = min(range(len(valid)), key=valid.__getitem__, default=None)
        speeds = sorted(run.curve(run.train, "tokens_per_second")[1])
        rows.append(
            (
                run.name,
                str(max(run.train, default=0)),
                f"{losses[0]:.4f}" if iterations else "-",
                f"{losses[-1]:.4f}" if iterations else "-",
                f"{valid[best]:.4f}" if best is not None else "-",
                str(evaluated[best]) if best is not None else "-",
                f"{speeds[len(speeds) // 2]:.0f}" if speeds else "-",
                str(run.train[max(run.train)]["nonfinite_steps"]) if run.train else "-",
                str(run.broken_lines),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw(runs: Sequence[Run], output: Path, *, over_tokens: bool) -> None:
    """Draw the panels into a PNG.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "pictures need matplotlib, which is not installed: pip install megatron-deepspeed[plot]"
        ) from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for number, run in enumerate(runs):
            _draw_run(axes, run, key, color=f"C{number}", over_tokens=over_tokens)
        axes.set(title=title, xlabel="consumed tokens" if over_tokens else "iteration")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error


def _draw_run(axes: Axes, run: Run, key: str, *, color: str, over_tokens: bool) -> None:
    def place(reports: dict[int, Record], iterations: list[int]) -> list[int]:
        return [reports[iteration]["consumed_tokens"] for iteration in iterations] if over_tokens else iterations

    iterations, values = run.curve(run.train, key)
    axes.plot(place(run.train, iterations), values, color=color, linewidth=1, label=f"{run.name}: train")
    if key == "lm_loss" and run.validation:
        iterations, values = run.curve(run.validation, key)
        axes.plot(
            place(run.validation, iterations), values, "o--", color=color, markersize=4, label=f"{run.name}: validation"
        )


if __name__ == "__main__":
    sys.exit(main())
