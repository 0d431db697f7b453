#!/usr/bin/env python3
"""Measure what ranks can tell each other: `deepspeed tools/benchmark_collectives.py`, under any launcher.

For all-gather, reduce-scatter, all-reduce, all-to-all and a message to the next rank, over all ranks of the run: the
microseconds of each size and the GB/s at which a rank receives (an all-reduce counts as reduce-scatter and all-gather).
At the end latency and bandwidth of each, the line `time = latency + bytes / bandwidth` that fits the sizes best in
relative terms: what `tools/predict_scaling.py` asks for. NCCL where there are GPUs, gloo on CPUs.

  --mib A,B,...   MiB that a rank receives (default: 1,4,16,64)
  --repeat N      collectives that are timed together, after as many that are not (default: 20)
  --json FILE     write all figures
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from benchmark import positive, save_json

from megatron.config.errors import UserError, tell
from megatron.engine.launch import leave, read_environment, start, stop

TIME_LIMIT = timedelta(minutes=5)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    arguments, rank = parse(argv), 0
    try:
        environment = read_environment()
        rank = environment.rank
        if environment.world_size == 1:
            raise UserError(
                "one rank has nobody to talk to: start several, as in `deepspeed tools/benchmark_collectives.py`"
            )
        device = start(environment, TIME_LIMIT)
        figures: dict[str, Any] = {"device": device.type, "ranks": environment.world_size, "collectives": {}}
        if rank == 0:
            print(f"{environment.world_size} ranks, {device.type}, received by each:")
            print(f"{'':16}" + "".join(f"{f'{mib:g} MiB':>20}" for mib in arguments.mib) + f"{'fit':>28}", flush=True)
        for name, times in measure(arguments.mib, arguments.repeat, environment.world_size, device):
            latency, bandwidth = fit(times)
            rate = bandwidth if math.isfinite(bandwidth) else None
            figures["collectives"][name] = {"seconds": times, "latency": latency, "bytes_per_second": rate}
            if rank == 0:
                cells = (f"{f'{1e6 * t:.0f} us {size / t / 1e9:.1f} GB/s':>20}" for size, t in times.items())
                line = f"{1e6 * latency:.0f} us + {bandwidth / 1e9:.1f} GB/s"
                print(f"{name:16}{''.join(cells)}{line:>28}", flush=True)
        stop()
        if rank == 0 and arguments.json is not None:
            save_json(figures, arguments.json)
    except UserError as error:
        tell(error, rank)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def sizes(text: str) -> list[float]:
        found = [float(part) for part in text.split(",")]
        if min(found) <= 0:
            raise ValueError
        return found

    parser.add_argument("--mib", type=sizes, default=[1.0, 4.0, 16.0, 64.0], help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=positive, default=20, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(mib: Sequence[float], repeat: int, ranks: int, device: Any) -> Iterator[tuple[str, dict[int, float]]]:
    """Seconds of each collective by the bytes that a rank receives; bf16, as training has it."""
    import torch
    import torch.distributed as dist

    from megatron.parallel.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
    from megatron.parallel.groups import Group

    here = dist.get_rank()
    world = Group(ranks=tuple(range(ranks)), rank=here, handle=dist.group.WORLD)

    def tensor(size: int) -> Any:
        return torch.ones(size // 2, dtype=torch.bfloat16, device=device)

    def gather(received: int) -> Callable[[], Any]:
        shard = tensor(received // (ranks - 1))
        return lambda: start_all_gather(shard, world).wait()

    def scatter(received: int) -> Callable[[], Any]:
        whole = tensor(received // (ranks - 1)).repeat(ranks)
        return lambda: start_reduce_scatter(whole, world).wait()

    def reduce(received: int) -> Callable[[], Any]:
        whole = tensor(received // (2 * (ranks - 1))).repeat(ranks)
        return lambda: start_all_reduce(whole, world).wait()

    def exchange(received: int) -> Callable[[], Any]:
        mine = tensor(received // (ranks - 1)).repeat(ranks)
        theirs = torch.empty_like(mine)
        return lambda: dist.all_to_all_single(theirs, mine)

    def send(received: int) -> Callable[[], Any]:
        mine, theirs = tensor(received), tensor(received)
        sent = dist.P2POp(dist.isend, mine, (here + 1) % ranks)
        awaited = dist.P2POp(dist.irecv, theirs, (here - 1) % ranks)
        return lambda: [work.wait() for work in dist.batch_isend_irecv([sent, awaited])]

    names = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send")
    for name, make in zip(names, (gather, scatter, reduce, exchange, send), strict=True):
        yield name, {size: seconds_of(make(size), repeat, device) for size in (round(2**20 * one) for one in mib)}


def seconds_of(collective: Callable[[], Any], repeat: int, device: Any) -> float:
    """Time of one of many that follow each other: the median of three rounds, the slowest rank's."""
    import torch
    import torch.distributed as dist

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    rounds = []
    for _ in range(4):  # the first warms up
        wait()
        began = time.perf_counter()
        for _ in range(repeat):
            collective()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rounds.append((time.perf_counter() - began) / repeat)
    slowest = torch.tensor(statistics.median(rounds[1:]), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def fit(seconds: dict[int, float]) -> tuple[float, float]:
    """Latency in s and bandwidth in bytes/s by which `time = latency + bytes / bandwidth` errs least, relatively."""
    if len(seconds) == 1:
        ((size, taken),) = seconds.items()
        return 0.0, size / taken
    # Of a x 1/t + b x bytes/t = 1: two normal equations.
    rows = [(1 / taken, size / taken) for size, taken in seconds.items()]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    latency, slope = (a * bb - b * ab) / (aa * bb - ab * ab), (b * aa - a * ab) / (aa * bb - ab * ab)
    if latency < 0:  # the line through the origin fits best of those that are possible
        return 0.0, bb / b
    if slope <= 0:  # as slow however much it is: so fits a latency alone
        return a / aa, math.inf
    return latency, 1 / slope


if __name__ == "__main__":
    leave(main())
