#!/usr/bin/env python3
"""Measure the fused operations on this machine's GPU, beside plain torch, the same compiled, and other libraries.

For each operation and pass: the median time of a call, the bytes that it must move at the least (every input read
once, every output written once), this rate, and the rate in percent of what a copy of as many bytes reaches here; for
the output head TFLOP/s, and these in percent of a large product's. Then how many times as long the others take, where
they are installed, the distance of the results from fp64, ||x - exact|| / ||exact||, beside plain torch's own in the
same dtype, and the memory that both passes take at their peak, beside plain torch's. The last lines name what falls
short: passes below 85 % of the copy's rate, operations slower than another, results farther from fp64. Attention has a
tool of its own, benchmark_attention.py.

    python tools/benchmark_kernels.py
    python tools/benchmark_kernels.py --operations layer_norm bias_swiglu --rows 8192 65536 --hidden 4096 --json a.json
    compute-sanitizer --tool racecheck python tools/benchmark_kernels.py --once --rows 67 --hidden 640
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

import torch
import torch._functorch.config
from kernel_operations import FAMILIES
from kernel_timing import Operation, Times, copy_rate, copy_time, errors, matrix_rate, pass_times

from megatron.config.errors import UserError
from megatron.kernels.build import build_all
from megatron.kernels.fp8 import E4M3, E5M2, fused_quantise

OTHERS = ("eager", "compiled", "liger", "apex")
PASSES = ("forward", "backward", "both")
LEAST_OF_COPY = 0.85
"""What a pass that moves memory should reach of the copy's rate."""
SPREAD = 1.02
"""Times of two runs differ by so much without a reason."""
LEEWAY = 1.1
"""Errors of two roundings to the same type differ by so much, as in tests/kernels/fused.py."""


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", help="names of the first column; all by default")
    parser.add_argument("--rows", nargs="+", type=int, default=[8192], help="tokens")
    parser.add_argument("--hidden", nargs="+", type=int, default=[2048], help="sizes of the model")
    parser.add_argument(
        "--compile-seconds", type=float, default=45.0, help="after which no further operation is compiled by torch"
    )
    parser.add_argument("--once", action="store_true", help="call each operation and its backward once, untimed")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this tool measures a GPU and torch sees none here")
    try:
        build_all()
    except UserError as error:
        sys.exit(f"error: {error}")
    if options.once:
        call_once(chosen(options), [(rows, hidden) for rows in options.rows for hidden in options.hidden])
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; others: their time over the fused one's")
    rates = {"copy": copy_rate(), "matrix": matrix_rate()}
    copies, products = rates["copy"] / 1e12, rates["matrix"] / 1e12
    print(f"this card: copies {copies:.2f} TB/s, read and written; products {products:.0f} TFLOP/s")
    columns = "".join(f"{name:>9}" for name in OTHERS)
    print(
        f"{'operation':16} {'size':>15} {'pass':8} {'us':>8} {'MB':>7} {'GB/s':>6} {'of copy':>7}{columns} "
        f"{'error':>8} {'plain':>8} {'peak MiB':>8} {'plain':>6} {'host us':>7}"
    )
    torch._functorch.config.donated_buffer = False  # backward is called several times
    records, budget = [], options.compile_seconds
    for operation in chosen(options):
        started = time.monotonic()
        records.append(measure(operation, compiled=budget > 0))
        budget -= time.monotonic() - started
        print("\n".join(lines(records[-1], rates["matrix"])), flush=True)
        torch.cuda.empty_cache()
    short = [line for record in records for line in shortfalls(record)]
    print("\n".join(["short of what is asked:", *short] if short else ["nothing falls short"]))
    if options.json is not None:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bf16", "rates": rates}
        options.json.write_text(json.dumps({**about, "operations": records}, indent=1) + "\n", encoding="utf-8")


def call_once(operations: Iterable[Operation], matrices: Iterable[tuple[int, int]]) -> None:
    """Call what is fused, for a tool that watches memory accesses; matrices of these shapes are brought into 8 bits."""
    for operation in operations:
        found = operation.fused(*operation.make(operation.rows))
        results = [found] if isinstance(found, torch.Tensor) else list(found)
        torch.autograd.backward(results, [torch.randn_like(result) for result in results])
        print(f"{operation.name} {operation.size}", flush=True)
    for shape in matrices:
        matrix = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for form in (E4M3, E5M2):
            fused_quantise(matrix, form, sums=True)
            print(f"quantise {form} {shape[0]}x{shape[1]}", flush=True)
    torch.cuda.synchronize()


def chosen(options: argparse.Namespace) -> Iterator[Operation]:
    """Give each operation that was asked for once at each size."""
    done = set()
    for rows in options.rows:
        for hidden in options.hidden:
            for operation in (operation for family in FAMILIES for operation in family(rows, hidden)):
                asked = options.operations is None or operation.name in options.operations
                if asked and (operation.name, operation.size) not in done:
                    done.add((operation.name, operation.size))
                    yield operation


def measure(operation: Operation, *, compiled: bool) -> dict[str, Any]:
    """Return one operation's figures."""
    contenders = {"eager": operation.plain, **operation.others}
    if compiled:
        torch._dynamo.reset()
        contenders["compiled"] = torch.compile(operation.plain, dynamic=False)
    times: dict[str, Times] = {"fused": pass_times(operation, operation.fused)}
    failures = {}
    for name, function in contenders.items():
        try:
            times[name] = pass_times(operation, function)
        except Exception as error:  # another library's failure is its own figure's, not the table's
            failures[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            torch.cuda.empty_cache()
    forward, backward = operation.forward_bytes, operation.backward_bytes
    return {
        "name": operation.name,
        "size": operation.size,
        "flops": operation.flops,
        "bytes": {"forward": forward, "backward": backward, "both": forward + backward},
        "copy_seconds": {"forward": copy_time(forward), "backward": copy_time(backward)},
        "seconds": {name: {which: getattr(found, which) for which in PASSES} for name, found in times.items()},
        "host_seconds": {name: found.host for name, found in times.items()},
        "peak_bytes": {name: found.peak_bytes for name, found in times.items()},
        "errors": errors(operation),
        "failures": failures,
    }


def lines(record: dict[str, Any], matrix: float) -> Iterator[str]:
    """Write one operation's rows of the table; `matrix` is the card's rate of products."""
    seconds, copies = record["seconds"], record["copy_seconds"]
    copies = {**copies, "both": copies["forward"] + copies["backward"]}
    for which in PASSES:
        time_of = {name: found[which] for name, found in seconds.items()}
        own, num_bytes = time_of["fused"], record["bytes"][which]
        ratios = "".join(f"{time_of[name] / own:9.2f}" if name in time_of else f"{'-':>9}" for name in OTHERS)
        line = f"{record['name']:16} {record['size']:>15} {which:8} {own * 1e6:8.1f} "
        if not record["flops"]:
            line += f"{num_bytes / 1e6:7.1f} {num_bytes / own / 1e9:6.0f} {100 * copies[which] / own:6.1f}%"
        elif which == "both":
            rate = record["flops"] / own
            line += f"{rate / 1e12:5.0f} TFLOP/s {100 * rate / matrix:7.1f}%"
        else:
            line += " " * 22
        yield line + ratios + (summary(record) if which == "both" else "")
    for name, failure in record["failures"].items():
        yield f"# {name}: {failure[:120]}"


def shortfalls(record: dict[str, Any]) -> Iterator[str]:
    """Say where an operation falls short of the copy, of another implementation or of plain torch's exactness."""
    name, seconds = f"{record['name']} {record['size']}", record["seconds"]
    for which in PASSES[:2]:
        share = record["copy_seconds"][which] / seconds["fused"][which]
        if not record["flops"] and share < LEAST_OF_COPY:
            yield f"  {name} {which}: {100 * share:.1f} % of the copy's rate"
    # Of both passes: some do backward's work in forward.
    for other, found in seconds.items():
        if found["both"] * SPREAD < seconds["fused"]["both"]:
            yield f"  {name}: {other} takes {found['both'] / seconds['fused']['both']:.2f} of its time"
    if record["errors"] is not None and record["errors"][0] > LEEWAY * record["errors"][1]:
        yield f"  {name}: {record['errors'][0]:.1e} from fp64, plain torch {record['errors'][1]:.1e}"


def summary(record: dict[str, Any]) -> str:
    """Write what is told once for both passes."""
    exactness = record["errors"] or (None, None)
    told = "".join(f" {'-':>8}" if error is None else f" {error:8.1e}" for error in exactness)
    peaks = [record["peak_bytes"].get(name, float("nan")) / 2**20 for name in ("fused", "eager")]
    return f"{told} {peaks[0]:8.0f} {peaks[1]:6.0f} {record['host_seconds']['fused'] * 1e6:7.0f}"


if __name__ == "__main__":
    main()
