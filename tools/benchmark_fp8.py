#!/usr/bin/env python3
"""Measure what --fp8 is made of on this machine's GPU: products in 8 bits beside bf16, and bringing matrices into them.

For the four weights of a block, each in its three products: TFLOP/s in bf16; with one scale a matrix as --fp8 has it,
summed in the matrix unit alone (fast) and handed over to fp32 (exact); with one scale a row (exact). Then the pass over
a matrix in bf16 that finds its largest number and the one that makes both copies, in GB/s and in percent of a copy of
as many bytes, beside plain torch. At the end the milliseconds of a block's products, forward and backward, with all of
that in.

    python tools/benchmark_fp8.py
    python tools/benchmark_fp8.py --tokens 16384 --hidden 4096 --ffn 11008 --json fp8.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

import torch
from kernel_timing import copy_time, gpu_time, number_of_sets
from torch import Tensor

from megatron.kernels.build import load_kernel
from megatron.kernels.fp8 import E4M3, E5M2, fused_quantise, quantise
from megatron.kernels.fp8_products import Fp8Products
from megatron.parallel.linear import linear
from megatron.parallel.products import PLAIN, Products

Figures = dict[str, Any]
WAYS = ("bf16", "fast", "exact", "rows")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="rows of inputs")
    parser.add_argument("--hidden", type=int, default=2048, help="size of the model")
    parser.add_argument("--ffn", type=int, help="width of the MLP (default: four times as wide)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this tool measures a GPU and torch sees none here")
    hidden, ffn = options.hidden, options.ffn or 4 * options.hidden
    weights = {"qkv": (3 * hidden, hidden), "output": (hidden, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": options.tokens}
    print(", ".join(map(str, about.values())), "tokens")
    figures: Figures = {**about, "products": {}, "quantise": {}, "layers": {}}
    print(f"\n{'weight':8} {'product':16}" + "".join(f"{way:>8}" for way in WAYS) + "   TFLOP/s")
    for name, shape in weights.items():
        for product, (n, m, k) in product_sizes(options.tokens, *shape).items():
            rates = product_rates(n, m, k, product)
            figures["products"][f"{name}, {product}"] = rates
            print(f"{name:8} {product:16}" + "".join(f"{rates[way]:8.0f}" for way in WAYS), flush=True)
    print(f"\n{'columns':>8} {'':16}{'us':>8} {'GB/s':>7} {'of copy':>8} {'plain us':>9}")
    for columns in sorted({*(i for _, i in weights.values()), *(o for o, _ in weights.values())}):
        for what, row in quantising(options.tokens, columns).items():
            figures["quantise"][f"{columns}, {what}"] = row
            print(
                f"{columns:8} {what:16}{row['us']:8.1f} {row['gbps']:7.0f} {row['of_copy']:8.0%} "
                f"{row['plain_us']:9.1f}",
                flush=True,
            )
    figures["layers"] = block_times(options.tokens, weights)
    print("\n" + ", ".join(f"{name} {ms:.3f} ms" for name, ms in figures["layers"].items()) + " a block")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def product_sizes(tokens: int, outputs: int, inputs: int) -> dict[str, tuple[int, int, int]]:
    """Give rows and columns of each product's result, and the length of its sums."""
    return {
        "output": (tokens, outputs, inputs),
        "input gradient": (tokens, inputs, outputs),
        "weight gradient": (outputs, inputs, tokens),
    }


def product_rates(n: int, m: int, k: int, product: str) -> dict[str, float]:
    """Return TFLOP/s of one product in each of the ways; a gradient is E5M2."""
    sets = number_of_sets(2 * (n * k + m * k))
    dtype = E4M3 if product == "output" else E5M2
    wide = [(normal(n, k), normal(m, k)) for _ in range(sets)]
    made = [(fused_quantise(a, dtype), fused_quantise(b, E4M3)) for a, b in wide]
    by_rows = torch.ones(n, 1, device="cuda"), torch.ones(1, m, device="cuda")

    def scaled(a: Any, b: Any, scales: tuple[Tensor, Tensor] | None, *, fast: bool) -> Tensor:
        scale_a, scale_b = scales or (a.scale, b.scale)
        return torch._scaled_mm(
            a.by_row, b.by_row.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    ways: dict[str, list[Callable[[], Any]]] = {
        "bf16": [partial(torch.mm, a, b.t()) for a, b in wide],
        "fast": [partial(scaled, a, b, None, fast=True) for a, b in made],
        "exact": [partial(scaled, a, b, None, fast=False) for a, b in made],
        "rows": [partial(scaled, a, b, by_rows, fast=False) for a, b in made],
    }
    return {way: rate(calls, 2.0 * n * m * k) for way, calls in ways.items()}


def rate(calls: list[Callable[[], Any]], flops: float) -> float:
    """Return TFLOP/s; none where torch does not offer it."""
    try:
        return flops / gpu_time(calls * 3)[0] / 1e12
    except (RuntimeError, ValueError) as error:
        print(f"  ({str(error).splitlines()[0]})", file=sys.stderr)
        return float("nan")


def quantising(tokens: int, columns: int) -> dict[str, dict[str, float]]:
    """Time the two passes over a matrix, and both with sums over its rows."""
    count = tokens * columns
    sets = [normal(tokens, columns) for _ in range(number_of_sets(4 * count))]
    kernel, parts = load_kernel("fp8"), load_kernel("fp8").parts(count, torch.cuda.current_device())
    stream, device = torch.cuda.current_stream().cuda_stream, torch.cuda.current_device()
    largest = torch.empty(parts, device="cuda")

    def find_largest(x: Tensor) -> None:
        kernel.largest(x.data_ptr(), largest.data_ptr(), count, parts, device, stream)

    def plain_largest(x: Tensor) -> Tensor:
        return x.abs().amax()

    times: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
        "largest": (find_largest, plain_largest, 2.0 * count),
        "both copies": (partial(fused_quantise, dtype=E4M3), partial(quantise, dtype=E4M3), 6.0 * count),
        "rows alone": (
            partial(fused_quantise, dtype=E4M3, by_column=False),
            partial(quantise, dtype=E4M3, by_column=False),
            5.0 * count,
        ),
        "and sums": (
            partial(fused_quantise, dtype=E5M2, sums=True),
            partial(quantise, dtype=E5M2, sums=True),
            6.0 * count,
        ),
    }
    rows = {}
    for what, (function, plain, num_bytes) in times.items():
        seconds = gpu_time([partial(function, x) for x in sets])[0]
        plain_seconds = gpu_time([partial(plain, x) for x in sets[:3]])[0]
        rows[what] = {
            "us": 1e6 * seconds,
            "gbps": num_bytes / seconds / 1e9,
            "of_copy": copy_time(num_bytes) / seconds,
            "plain_us": 1e6 * plain_seconds,
        }
    return rows


def block_times(tokens: int, weights: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Time forward and backward of a block's linear layers, weights brought into 8 bits beforehand."""
    fp8 = Fp8Products(quantise=fused_quantise)
    answer = {}
    for name, products in (("bf16", PLAIN), ("fp8", fp8)):
        with fp8.weights_stay():
            answer[name] = sum(1e3 * layer_time(products, tokens, *shape) for shape in weights.values())
    return answer


def layer_time(products: Products | Any, tokens: int, outputs: int, inputs: int) -> float:
    """Time forward and backward of one layer with a bias, in seconds."""
    weight = (0.02 * normal(outputs, inputs)).requires_grad_()
    bias = torch.zeros(outputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    sets = [(normal(tokens, inputs).requires_grad_(), normal(tokens, outputs)) for _ in range(3)]

    def both(x: Tensor, grad: Tensor) -> None:
        torch.autograd.grad(linear(x, weight, bias, products=products), (x, weight, bias), grad)

    return gpu_time([partial(both, *given) for given in sets])[0]


def normal(rows: int, columns: int) -> Tensor:
    """Make a matrix of normal numbers."""
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
