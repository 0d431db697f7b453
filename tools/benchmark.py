#!/usr/bin/env python3
r"""Train a model for a few steps on synthetic tokens and print its speed and memory: one run, or a table of many.

    python tools/benchmark.py --model gpt-1.3b --micro-batch-size 8 --accumulate 8
    python tools/benchmark.py --model gpt-1.3b --ranks 2 --tensor-model-parallel-size 2 --sequence-parallel \
        --recompute-granularity full --loss-chunk-size 4096 --sweep seq=2k..1M --json long.json --picture long.png
    python tools/benchmark.py --model gpt-13b --ranks 8 --zero-stage 3 --predict

Flags of its own come before or between those of pretrain_gpt.py, which win over what the model's name implies:
  --model NAME      a shape of tools/model_shapes.py
  --ranks N         processes of this machine, one for each GPU (default: 1)
  --steps K         optimizer steps that count (default: 5)
  --warm-up W       steps before them, a multiple of K (default: K); with 0 the first step counts, and so does what it
                    alone does: kernels are loaded, products planned, memory found, but none of it for the numbers that
                    the optimizer makes at its end
  --accumulate N    micro-batches of a step, unless --global-batch-size says it (default: 1)
  --sweep NAME=A,B,...   one run for each value of a flag; `seq` and `mbs` are --seq-length and --micro-batch-size, 2k
                    is 2048, 1M 1048576, A..B doubles from A to B; several sweeps make all combinations
  --predict         start nothing: the memory that the formulas predict
  --json FILE, --picture PNG   write the rows; draw speed and memory over the first sweep
  --timeout S       seconds after which a run is given up (default: 1800)

Model FLOPs are 6 x weights in products x tokens + 12 x layers x heads x head size x length x tokens, recompute not
counted ("full"); "causal" counts half of the second term, what a causal model needs. MFU is of "full". The overhead is
the host's time of a step outside of DeepSpeed's forward, backward and step; "data" and "agreement" are what of it is
the wait for data and for the ranks to agree to go on; the device notices none of them while it has work. Each run has
processes of its own: one that runs out of memory is a row.
Exit code 0 unless a run failed for another reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from model_shapes import SHAPES, shape_flags

from megatron.config.derived import data_parallel_size
from megatron.config.errors import UserError, tell
from megatron.config.rules import check_rules
from megatron.config.run import RunConfig, load_run_config

Row = dict[str, Any]

DEFAULTS = (
    "--mock-data --vocab-size 50304 --seq-length 2048 --attention-dropout 0 --hidden-dropout 0 --lr 1e-4 "
    "--train-iters 1 --num-workers 0"
)
SHORT = {"seq": "seq-length", "mbs": "micro-batch-size"}
UNITS = {"": 1, "k": 2**10, "M": 2**20}
COLUMNS = (
    ("ms/step", "ms_per_step", ",.1f"),
    ("tokens/s/GPU", "tokens_per_second_per_gpu", ",.0f"),
    ("TFLOP/s full", "tflops_full", ".1f"),
    ("causal", "tflops_causal", ".1f"),
    ("hardware", "tflops_hardware", ".1f"),
    ("MFU", "mfu_full", ".1%"),
    ("GiB peak", "allocated_gib", ".2f"),
    ("predicted", "predicted_gib", ".2f"),
    ("reserved", "reserved_gib", ".2f"),
    ("overhead ms", "overhead_ms_per_step", ".2f"),
    ("data ms", "data_ms_per_step", ".2f"),
    ("agreement ms", "agreement_ms_per_step", ".2f"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every row; returns the exit code."""
    try:
        options, words = parse(argv)
        sweeps = [parse_sweep(text) for text in options.sweep]
        if options.picture is not None:
            require_matplotlib()
        rows: list[Row] = []
        for values in itertools.product(*(values for _, values in sweeps)):
            swept = dict(zip((name for name, _ in sweeps), values, strict=True))
            if not rows:
                print(heading(list(swept)), flush=True)
            rows.append(measure(options, words, swept))
            print(line(rows[-1]), flush=True)
            if options.json is not None:  # after each row: a later one may bring the machine down
                save_json({"command": sys.argv, "rows": rows}, options.json)
        if options.picture is not None:
            draw(rows, options.picture)
    except UserError as error:
        tell(error, rank=0)
        return 2
    return 1 if any(row.get("error", "out of memory") != "out of memory" for row in rows) else 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Tell this tool's flags from those of the run.

    Raises:
        UserError: steps that warm up are no multiple of those that count.
    """
    parser = argparse.ArgumentParser(
        usage="benchmark.py [--model NAME] [--ranks N] [--steps K] ... FLAGS OF pretrain_gpt.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", choices=SHAPES, help=argparse.SUPPRESS)
    for name, default in (("--ranks", 1), ("--steps", 5), ("--accumulate", 1), ("--timeout", 1800)):
        parser.add_argument(name, type=positive, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--warm-up", type=_count, help=argparse.SUPPRESS)
    parser.add_argument("--sweep", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--predict", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    options, words = parser.parse_known_args(argv)
    options.warm_up = options.steps if options.warm_up is None else options.warm_up
    if options.warm_up % options.steps:
        raise UserError(f"--warm-up {options.warm_up} is no multiple of --steps {options.steps}: choose one, or 0")
    shape = [] if options.model is None else shape_flags(options.model)
    return options, [*shlex.split(DEFAULTS), *shape, *words]


def positive(word: str) -> int:
    """Read a number of at least 1."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} is not at least 1")
    return value


def _count(word: str) -> int:
    value = int(word)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{word} is less than 0")
    return value


def parse_sweep(text: str) -> tuple[str, list[str]]:
    """Read NAME=A,B,... into the flag's name and its values.

    Raises:
        UserError: it is not of that form.
    """
    name, _, values = text.partition("=")
    found = [value for word in values.replace(",...,", "..").split(",") for value in _values(word)]
    if not name or not all(found):
        raise UserError(f"--sweep {text}: write it as NAME=A,B,... or NAME=A..B, as in --sweep seq=2k,8k,32k..1M")
    return SHORT.get(name, name.lstrip("-")), found


def _values(word: str) -> Iterator[str]:
    first, dots, last = word.partition("..")
    if not dots:
        yield _number(word)
        return
    value, end = _number(first), _number(last)
    if not (value.isdigit() and end.isdigit() and 0 < int(value) <= int(end)):
        yield ""
        return
    while int(value) <= int(end):
        yield value
        value = str(2 * int(value))


def _number(word: str) -> str:
    """Write 2k as 2048; other words stay."""
    number = re.fullmatch(r"(\d+)([kM])", word)
    return str(int(number[1]) * UNITS[number[2]]) if number else word


def measure(options: argparse.Namespace, words: Sequence[str], swept: dict[str, str]) -> Row:
    """Make one row: the swept values, the flags, and what was predicted and measured, or `error`."""
    words = [*words, *(word for name, value in swept.items() for word in (f"--{name}", value))]
    try:
        config, words = configure(words, options.ranks, options.accumulate)
    except UserError as error:
        if not swept:
            raise
        return {"swept": swept, "flags": words, "error": f"refused: {str(error).splitlines()[0]}"}
    from megatron.training.benchmark import predict_run

    row: Row = {"swept": swept, "ranks": options.ranks, "flags": words}
    try:
        plan = predict_run(config, options.ranks)
        peak = plan.first_peak if options.warm_up + options.steps == 1 else plan.peak
        row |= {"predicted_gib": peak / 2**30, "predicted": plan.to_json()}
        return row if options.predict else row | run(config, options)
    except UserError as error:
        if not swept:
            raise
        return row | {"error": f"refused: {str(error).splitlines()[0]}"}


def configure(words: list[str], ranks: int, accumulate: int) -> tuple[RunConfig, list[str]]:
    """Read the run's flags; the batch follows from `accumulate` where they leave it open.

    Raises:
        ConfigError: they are not legal.
    """
    config = load_run_config(words, ranks).config
    if not any(re.match(r"--(global[-_]batch[-_]size|deepspeed[-_]config)\b", word) for word in words):
        samples = config.training.micro_batch_size * data_parallel_size(config.parallel, ranks)
        words = [*words, "--global-batch-size", str(accumulate * samples)]
        config = load_run_config(words, ranks).config
    check_rules(config, ranks)
    return config, words


def run(config: RunConfig, options: argparse.Namespace) -> Row:
    """Train in processes of their own; what went wrong is in `error`."""
    from megatron.engine.local_ranks import RankFailedError, run_local_ranks
    from megatron.training.benchmark import for_measuring, join_figures, measure_run

    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        config = for_measuring(config, options.steps, folder, warm_up=options.warm_up)
        try:
            ranks = run_local_ranks(options.ranks, measure_run, config, folder, timeout=float(options.timeout))
            return join_figures(ranks)
        except RankFailedError as error:
            if is_out_of_memory(str(error)):
                return {"error": "out of memory"}
            print(error, file=sys.stderr, flush=True)
            return {"error": str(error).strip().splitlines()[-1]}


def is_out_of_memory(told: str) -> bool:
    """Whether what ranks told of their end says that memory ran out."""
    return re.search(r"out of memory|OutOfMemoryError|can't allocate memory", told) is not None


def heading(names: list[str]) -> str:
    """Name the columns."""
    return "  ".join([*(f"{name:>16}" for name in names), *(f"{title:>12}" for title, *_ in COLUMNS)])


def line(row: Row) -> str:
    """Write a row of the table."""
    cells = [f"{value:>16}" for value in row["swept"].values()]
    for _, key, form in COLUMNS:
        value = row.get(key)
        cells.append(f"{'-' if value is None else format(value, form):>12}")
    return "  ".join(cells) + (f"  {row['error']}" if "error" in row else "")


def require_matplotlib() -> None:
    """Check before anything runs that a picture can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "pictures need matplotlib, which is not installed: pip install megatron-deepspeed[plot]"
        ) from error
    matplotlib.use("Agg")


def draw(rows: Sequence[Row], output: Path) -> None:
    """Draw TFLOP/s and memory over the first sweep into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    labels = [", ".join(row["swept"].values()) or "run" for row in rows]
    for axes, title, series in (
        (speed, "model TFLOP/s per GPU", {"full": "tflops_full", "causal": "tflops_causal"}),
        (memory, "peak memory, GiB", {"measured": "allocated_gib", "predicted": "predicted_gib"}),
    ):
        for name, key in series.items():
            points = [(place, row[key]) for place, row in enumerate(rows) if row.get(key) is not None]
            axes.plot([place for place, _ in points], [value for _, value in points], "o-", label=name)
        for place, row in enumerate(rows):
            if "error" in row:
                axes.axvline(place, color="red", linestyle=":", label=row["error"][:40])
        axes.set(title=title, xlabel=", ".join(rows[0]["swept"]), ylim=(0, None))
        axes.set_xticks(range(len(rows)), labels, rotation=45)
        axes.grid(alpha=0.3)
        axes.legend()
    save_picture(figure, output)


def save_json(content: dict[str, Any], output: Path) -> None:
    """Write figures as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {output} cannot be written: {error}") from error


def save_picture(figure: Any, output: Path) -> None:
    """Write a figure as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {output} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
