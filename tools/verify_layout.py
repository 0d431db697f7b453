"""Prove that a layout trains the model that one rank trains: `python tools/verify_layout.py FLAGS OF pretrain_gpt.py`.

Flags of its own come before or between the others:
  --ranks N       processes of the layout (default: as few as show it)
  --steps K       optimizer steps, with the run's own optimizer (default: 5)
  --all           list everything that was compared, not the worst alone
  --json FILE     write everything that was compared

The run is scaled down, so the proof takes seconds on a laptop; on GPUs it runs over NCCL. Exit code 0: EQUAL,
1: DIFFERENT, or a rank failed; 2: the flags are not legal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.errors import UserError, tell
from megatron.config.run import RunConfig, parse_run_config

if TYPE_CHECKING:
    from rich.table import Table

    from megatron.training.certificate import Certificate, Finding
    from megatron.training.certify import Task

SHOWN = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Certify; returns the exit code."""
    arguments, words = parse(argv)
    config = parse_run_config(words)
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="verify-layout-") as folder:
            task, certificate = prove(config, arguments, Path(folder))
    except UserError as error:
        tell(error, rank=0)
        return 2
    if certificate is None:
        return 1
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(to_json(task, certificate), indent=1))
    show(certificate, everything=arguments.all, seconds=time.monotonic() - started)
    return 0 if certificate.equal else 1


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Tell this tool's flags from those of the run."""
    parser = argparse.ArgumentParser(
        usage="verify_layout.py [--ranks N] [--steps K] [--all] [--json FILE] FLAGS OF pretrain_gpt.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=_positive, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=_positive, default=5, metavar="K", help=argparse.SUPPRESS)
    parser.add_argument("--all", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def _positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} is not at least 1")
    return value


def prove(config: RunConfig, arguments: argparse.Namespace, folder: Path) -> tuple[Task, Certificate | None]:
    """Say what is compared, and compare it; without a certificate, the reason has been told."""
    from megatron.config.scaled_down import describe_changes
    from megatron.engine.local_ranks import RankFailedError
    from megatron.training.certify import certify, prepare

    task = prepare(config, ranks=arguments.ranks, steps=arguments.steps, folder=folder)
    precisions = " and ".join(task.precisions)
    print(f"one rank against {task.ranks}, in {precisions}, {arguments.steps} steps ...", flush=True)
    try:
        task, certificate = certify(task)
        print(f"scaled down: {', '.join(describe_changes(config, task.small))}")
        return task, certificate
    except RankFailedError as error:
        print(error, file=sys.stderr)
        print("NO VERDICT: a rank failed while it trained")
        return task, None


def to_json(task: Task, certificate: Certificate) -> dict[str, object]:
    """Give the verdict and everything it rests on."""
    return {
        "equal": certificate.equal,
        "ranks": task.ranks,
        "config": task.small.to_json(),
        "peak_gib": certificate.peak_gib,
        "findings": [{**dataclasses.asdict(finding), "holds": finding.holds} for finding in certificate.worst_first],
    }


def show(certificate: Certificate, *, everything: bool, seconds: float) -> None:
    """Print what was compared, the worst of it, and the verdict."""
    from rich.console import Console

    from megatron.training.certificate import describe_bounds

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(summary(certificate))
    for precision in dict.fromkeys(found.precision for found in certificate.findings):
        console.print(f"bounds in {precision}: {describe_bounds(precision)}", markup=False)
    parameters = [found for found in certificate.worst_first if found.what not in ("loss", "gradient norm")]
    listed = certificate.worst_first if everything else parameters[:SHOWN]
    console.print(details(listed, title="everything, worst first" if everything else "worst parameters"))
    for who, peaks in certificate.peak_gib.items():
        console.print(f"peak memory, {who}: {', '.join(f'{peak:.3f}' for peak in peaks)} GiB")
    wrong = [found for found in certificate.worst_first if not found.holds]
    names = list(dict.fromkeys(f"{found.what} of {found.name}" for found in wrong))
    console.print(
        f"[bold red]DIFFERENT[/]: {', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''} ({seconds:.0f} s)"
        if wrong
        else f"[bold green]EQUAL[/] ({len(certificate.findings)} comparisons, {seconds:.0f} s)"
    )


def summary(certificate: Certificate) -> Table:
    """One line for each kind of number in each precision."""
    table = _table("precision", "compared", "of them", "worst error", "its bound", "")
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for found in certificate.findings:
        kinds.setdefault((found.precision, found.what), []).append(found)
    for (precision, what), compared in kinds.items():
        worst = max(compared, key=lambda found: (not found.holds, found.severity))
        verdict = "equal" if worst.holds else f"[red]{sum(not found.holds for found in compared)} differ[/]"
        table.add_row(precision, what, str(len(compared)), _number(worst.error), _number(worst.bound), verdict)
    return table


def details(findings: Sequence[Finding], *, title: str) -> Table:
    """One line for each finding."""
    table = _table("precision", "compared", "of", "error", "bound", "error/bound", "worst copy", title=title)
    for found in findings:
        ratio = f"{found.severity:.3f}" if found.holds else f"[red]{found.severity:.3g}[/]"
        numbers = (_number(found.error), _number(found.bound), ratio)
        table.add_row(found.precision, found.what, found.name, *numbers, found.where)
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in ("of them", "worst error", "its bound", "error", "bound", "error/bound")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    return table


def _number(value: float) -> str:
    return f"{value:.1e}" if value % 1 else f"{value:g}"


if __name__ == "__main__":
    sys.exit(main())
