#!/usr/bin/env python3
"""Find the fastest tiles of this project's attention kernels on this GPU; the table in `tuning.py` takes the result.

    python tools/tune_attention.py --head-sizes 64 128 --lengths 2048 8192
    python tools/tune_attention.py --as-ampere

With `--as-ampere` a Hopper GPU computes with the matrix instructions of Ampere, without its copy engine, and within the
shared memory of Ampere's smaller chips: that ranks tiles for GPUs that are not at hand, it does not time them.

Each kernel runs with every candidate on random bf16 data, causal, 16k tokens of 2048 channels. It prints TFLOP/s, the
products that the algorithm asks for counted once: 2 in forward, 3 in the queries' gradient, 4 in the keys' and values'.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import get_args

import torch

from megatron.kernels.attention.flash.tuning import Kernel, Tile

HOPELESS = 0.8  # of the best so far: a candidate that is slower is not measured at the other lengths
SHARED_BYTES = 226 * 1024  # of a Hopper multiprocessor, less a little
SHARED_BYTES_OF_AMPERE = 99 * 1024  # of the smaller chips
TOKENS, CHANNELS = 16384, 2048
PRODUCTS = {"forward": 2, "query": 3, "key_value": 4}
Case = tuple[Kernel, int, Tile]


def main() -> None:
    """Compile everything on all cores, then measure one candidate after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--kernels", nargs="+", choices=get_args(Kernel), default=get_args(Kernel))
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--full", action="store_true", help="without the causal mask")
    parser.add_argument("--as-ampere", action="store_true", help="with the instructions of Ampere")
    args = parser.parse_args()
    if args.as_ampere:
        os.environ["DISABLE_MMA_V3"] = "1"  # read by Triton when it compiles, in the workers too
    find = candidates_for_ampere if args.as_ampere else candidates
    cases = [
        (kernel, size, tile)
        for kernel, size in itertools.product(args.kernels, args.head_sizes)
        for tile in find(kernel, size)
    ]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        failures = dict(zip(cases, pool.starmap(compile_case, [(case, not args.full) for case in cases]), strict=True))
    for kernel, size in itertools.product(args.kernels, args.head_sizes):
        rows: list[tuple[Tile, list[float]]] = []
        for case in cases:
            if case[:2] != (kernel, size):
                continue
            if failures[case]:
                print(f"{kernel} {size} {tuple(case[2])}: {failures[case]}")
                continue
            speeds: list[float] = []
            for place, length in enumerate(args.lengths):
                speeds.append(measure(case, length, not args.full))
                if speeds[-1] < HOPELESS * max((row[1][place] for row in rows if len(row[1]) > place), default=0):
                    break
            rows.append((case[2], speeds))
        rows.sort(key=lambda row: -sum(row[1]))
        print(f"\n{kernel}, heads of {size}, TFLOP/s at {args.lengths}")
        for tile, speeds in rows:
            print(f"  {' '.join(f'{speed:6.0f}' for speed in speeds)}  {tuple(tile)}", flush=True)


def candidates(kernel: Kernel, size: int) -> Iterator[Tile]:
    """Try what fits the shared memory, with and without the copy engine."""
    moving, resident = (32, 64, 128), (64, 128)
    kept = 1 if kernel == "forward" else 2
    for outer, inner, warps, stages in itertools.product(resident, moving, (4, 8), (1, 2, 3, 4)):
        fits = 2 * size * (kept * outer + 2 * stages * inner) < SHARED_BYTES
        shaped = outer == 16 * warps or (outer == 128 and size == 64) or (outer == 64 and size == 256)
        if not fits or not shaped or (stages == 1 and inner < 128):
            continue
        rows = (inner, outer) if kernel == "key_value" else (outer, inner)
        yield Tile(*rows, warps, stages, tma=True)
        if kernel == "key_value" and size > 64:
            yield Tile(*rows, warps, stages, tma=True, apart=True)
        if stages == 2:
            yield Tile(*rows, warps, stages, tma=True, registers={4: 168, 8: 128}[warps])
        if stages == 3 and inner == 64:
            yield Tile(*rows, warps, stages)


def candidates_for_ampere(kernel: Kernel, size: int) -> Iterator[Tile]:
    """Try what fits the shared memory of Ampere's smaller chips; a row of the matrix instructions takes 16 rows."""
    kept = 1 if kernel == "forward" else 2
    for outer, inner, warps, stages in itertools.product((64, 128), (16, 32, 64), (4, 8), (1, 2, 3)):
        fits = 2 * size * (kept * outer + 2 * stages * inner) <= SHARED_BYTES_OF_AMPERE
        if not fits or outer * size > 4096 * warps or (stages == 1 and inner < 64):
            continue
        rows = (inner, outer) if kernel == "key_value" else (outer, inner)
        yield Tile(*rows, warps, stages)
        if kernel == "key_value" and size > 64:
            yield Tile(*rows, warps, stages, apart=True)


def compile_case(case: Case, causal: bool) -> str | None:
    """Run a candidate once on little data, so that its binary is cached; returns what went wrong."""
    try:
        prepare(case, 1024, causal, tokens=2048)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None


def measure(case: Case, length: int, causal: bool) -> float:
    """Return TFLOP/s, from the median time."""
    from triton.testing import do_bench

    milliseconds = do_bench(prepare(case, length, causal), warmup=10, rep=40, return_mode="median")
    flops = PRODUCTS[case[0]] * 2 * max(TOKENS, length) * CHANNELS * length / (2 if causal else 1)
    return flops / milliseconds / 1e9


def prepare(case: Case, length: int, causal: bool, tokens: int = TOKENS) -> Callable[[], object]:
    """Make random tensors and return a call of the kernel on them."""
    from megatron.kernels.attention.flash import launch

    kernel, size, tile = case
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (length, max(1, tokens // length), CHANNELS // size, size)
    query, key, value, grad = (
        torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16) for _ in range(4)
    )
    options = launch.Options(scale=size**-0.5, causal=causal, window=0, softcap=0.0, dropout=0.0)
    if kernel == "forward":
        return lambda: launch.launch_forward(query, key, value, None, None, options, tile)
    output, log_sums = launch.launch_forward(query, key, value, None, None, options)
    if kernel == "query":
        return lambda: launch.launch_query(grad, query, key, value, output, log_sums, None, None, options, tile)
    deltas = (grad.float() * output.float()).sum(-1).permute(1, 2, 0).contiguous()
    return lambda: launch.launch_key_value(grad, query, key, value, log_sums, deltas, None, None, options, tile)


if __name__ == "__main__":
    main()
