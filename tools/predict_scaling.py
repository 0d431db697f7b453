#!/usr/bin/env python3
r"""Predict how fast a run is on more GPUs than are at hand, from rates that one GPU and the links between some showed.

    python tools/predict_scaling.py --model gpt-1.3b --micro-batch-size 8 --accumulate 4 --tflops 551 \
        --ranks 1,2,64,512,4096 --layout "data parallel:" \
        --layout "TP2+SP: --tensor-model-parallel-size 2 --sequence-parallel" --picture scaling.png

The formulas are in megatron/training/step_cost.py; what they leave out is said there. Flags of its own come before or
between those of pretrain_gpt.py, or of one layout:
  --model NAME       a shape of tools/model_shapes.py
  --ranks A,B,...    numbers of GPUs (default: 64,512,4096)
  --layout "NAME: FLAGS"   a line of the picture and its flags, also of those below; several times
  --accumulate N     micro-batches of a step, unless --global-batch-size says it (default: 1)
  --tflops X         causal TFLOP/s that tools/benchmark.py prints for such micro-batches on one GPU
  --host-ms X        what the host needs for a micro-batch, where that is more than the GPU does (default: 0)
  --gpus-per-host N  (default: 8)
  --local US,GBS     latency and bandwidth between GPUs of a host, as tools/benchmark_collectives.py prints them
                     (default: 27,258, two H200s)
  --network US,GBS   between hosts, for each GPU's port (default: 10,45: 400 Gb/s are assumed, nine tenths of them had)
  --measured "NAME: RANKS=MS,..."   what was measured of a layout: beside the prediction, and in the picture
  --json FILE, --picture PNG   write the rows; draw efficiency and the share of communication over the ranks

Efficiency is tokens a second and GPU over those of a GPU that does nothing but compute. The columns after it are
percent of a step: compute; tensor, ulysses, sends and data, in which ranks communicate and nothing else goes on
(communication is these four together); waiting for other pipeline stages; and for the host's launches.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from benchmark import DEFAULTS, configure, positive, require_matplotlib, save_json, save_picture
from model_shapes import SHAPES, shape_flags

from megatron.config.errors import UserError, tell

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Predict every row; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options, _ = parse(argv)
        if options.picture is not None:
            require_matplotlib()
        layouts = once_each("--layout", map(named_flags, options.layout or ["run:"]))
        measured = once_each("--measured", map(named_times, options.measured))
        if unknown := set(measured) - set(layouts):
            raise UserError(f"--measured {', '.join(sorted(unknown))}: there is no --layout of that name")
        print(heading(), flush=True)
        rows: list[Row] = []
        for name, flags in layouts.items():
            for ranks in options.ranks:
                rows.append({"layout": name, "ranks": ranks, "measured_ms": measured.get(name, {}).get(ranks)})
                rows[-1] |= predict([*argv, *flags], ranks)
                print(line(rows[-1]), flush=True)
        if all("refused" in row for row in rows):
            raise UserError(rows[0]["refused"])
        if options.json is not None:
            save_json({"command": argv, "rows": rows}, options.json)
        if options.picture is not None:
            draw(rows, options.picture)
    except UserError as error:
        tell(error, rank=0)
        return 2
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Tell this tool's flags from those of the run."""
    parser = argparse.ArgumentParser(
        usage='predict_scaling.py --tflops X [--model NAME] [--ranks A,B,...] [--layout "NAME: FLAGS"] ... '
        "FLAGS OF pretrain_gpt.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def link(text: str) -> tuple[float, float]:
        microseconds, gigabytes = map(float, text.split(","))
        if microseconds < 0 or gigabytes <= 0:
            raise ValueError
        return microseconds / 1e6, gigabytes * 1e9

    def numbers(text: str) -> list[int]:
        return [positive(word) for word in text.split(",")]

    parser.add_argument("--model", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=numbers, default=[64, 512, 4096], help=argparse.SUPPRESS)
    parser.add_argument("--layout", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--accumulate", type=positive, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--tflops", type=float, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--host-ms", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--gpus-per-host", type=positive, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--local", type=link, default="27,258", metavar="US,GBS", help=argparse.SUPPRESS)
    parser.add_argument("--network", type=link, default="10,45", metavar="US,GBS", help=argparse.SUPPRESS)
    parser.add_argument("--measured", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    options, words = parser.parse_known_args(argv)
    if options.tflops <= 0 or options.host_ms < 0:
        raise UserError(f"--tflops {options.tflops} must be above 0, --host-ms {options.host_ms} not below")
    shape = [] if options.model is None else shape_flags(options.model)
    return options, [*shlex.split(DEFAULTS), *shape, *words]


def once_each(flag: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Give what belongs to each name.

    Raises:
        UserError: a name comes twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UserError(f"{flag} {name}: is given twice; name each layout differently")
        found[name] = value
    return found


def named_flags(text: str) -> tuple[str, list[str]]:
    """Read `NAME: FLAGS`.

    Raises:
        UserError: it is not of that form.
    """
    name, colon, flags = text.partition(":")
    if not colon:
        raise UserError(f'--layout {text}: write it as "NAME: FLAGS", as in "TP2: --tensor-model-parallel-size 2"')
    return name.strip(), shlex.split(flags)


def named_times(text: str) -> tuple[str, dict[int, float]]:
    """Read `NAME: RANKS=MS,...`.

    Raises:
        UserError: it is not of that form.
    """
    name, _, times = text.partition(":")
    try:
        pairs = [word.split("=") for word in times.replace(" ", "").split(",")]
        return name.strip(), {int(ranks): float(ms) for ranks, ms in pairs}
    except ValueError as error:
        raise UserError(f'--measured {text}: write it as "NAME: RANKS=MS,...", as in "TP2: 2=641.5"') from error


def predict(argv: Sequence[str], ranks: int) -> Row:
    """Make one row: milliseconds and what they are for, or why the flags are `refused` for so many ranks."""
    from megatron.training.benchmark import predict_seconds
    from megatron.training.cluster import Cluster, Link
    from megatron.training.step_cost import PARTS

    options, words = parse(argv)
    cluster = Cluster(
        flops=options.tflops * 1e12,
        host_seconds=options.host_ms / 1e3,
        ranks_per_host=options.gpus_per_host,
        local=Link(*options.local),
        network=Link(*options.network),
    )
    try:
        config, words = configure(words, ranks, options.accumulate)
        cost = predict_seconds(config, ranks, cluster)
    except UserError as error:
        return {"refused": str(error)}
    tokens = config.training.global_batch_size * config.data.seq_length
    return {
        "flags": words,
        "tokens_per_step": tokens,
        "ms_per_step": 1e3 * cost.seconds,
        "tokens_per_second_per_gpu": tokens / cost.seconds / ranks,
        "efficiency": cost.efficiency,
        "shares": {part: getattr(cost, part) / cost.seconds for part in PARTS},
        "communication": cost.communication,
    }


def heading() -> str:
    """Name the columns."""
    from megatron.training.step_cost import PARTS

    titles = ("ranks", "ms/step", "tokens/s/GPU", "efficiency", "comm.", *PARTS, "measured", "off by")
    return f"{'layout':24}" + "".join(f"{title:>13}" for title in titles)


def line(row: Row) -> str:
    """Write a row of the table."""
    start = f"{row['layout']:24}{row['ranks']:>13,}"
    if "refused" in row:
        return f"{start}   refused: {row['refused'].splitlines()[0]}"
    cells = [f"{row['ms_per_step']:,.1f}", f"{row['tokens_per_second_per_gpu']:,.0f}", f"{row['efficiency']:.1%}"]
    cells += [f"{row['communication']:.1%}", *(f"{share:.1%}" for share in row["shares"].values())]
    if (measured := row["measured_ms"]) is not None:
        cells += [f"{measured:,.1f}", f"{row['ms_per_step'] / measured - 1:+.1%}"]
    return start + "".join(f"{cell:>13}" for cell in cells)


def draw(rows: Sequence[Row], output: Path) -> None:
    """Draw efficiency and the share of communication over the ranks into a PNG; what was measured as circles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    speed, talk = figure.subplots(1, 2)
    for name in dict.fromkeys(row["layout"] for row in rows):
        own = [row for row in rows if row["layout"] == name and "refused" not in row]
        ranks = [row["ranks"] for row in own]
        (drawn,) = speed.plot(ranks, [100 * row["efficiency"] for row in own], ".-", label=name)
        talk.plot(ranks, [100 * row["communication"] for row in own], ".-", label=name)
        done = [row for row in own if row["measured_ms"] is not None]
        had = [100 * row["efficiency"] * row["ms_per_step"] / row["measured_ms"] for row in done]
        speed.plot([row["ranks"] for row in done], had, "o", color=drawn.get_color(), fillstyle="none", markersize=9)
    for axes, title in ((speed, "efficiency, % (circles: measured)"), (talk, "communication, % of a step")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts := sorted({row["ranks"] for row in rows}), [f"{count:,}" for count in counts])
        axes.set(title=title, xlabel="GPUs", ylim=(0, 105 if axes is speed else None))
        axes.grid(alpha=0.3)
        axes.legend()
    save_picture(figure, output)


if __name__ == "__main__":
    sys.exit(main())
