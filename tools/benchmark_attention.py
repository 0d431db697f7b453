#!/usr/bin/env python3
"""Measure every attention backend that this machine can run: TFLOP/s of forward and backward, and the error.

    python tools/benchmark_attention.py --head-sizes 64 128 --lengths 2048 8192 32768

Random bf16, 16k tokens of 2048 channels (at least one sample), medians. FLOPs are 2 b h s s d forward with the causal
mask and twice that without, and 2.5 times forward's in backward. PyTorch's compiled FlexAttention runs beside them.
Errors are those of output and gradients, the largest, against fp64 at 1024 tokens.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention.interface import AttentionBackend, AttentionRequest
from megatron.kernels.attention.unfused import BACKEND as REFERENCE
from megatron.kernels.registry import find_implementations

TOKENS, CHANNELS = 16384, 2048
BACKWARD = 2.5  # products of backward over those of forward
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Print one line a backend, head size and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--groups", type=int, default=1, help="query heads that share a key head")
    parser.add_argument("--documents", type=int, default=1, help="of the same length in each sample, kept apart")
    parser.add_argument("--full", action="store_true", help="without the causal mask")
    parser.add_argument("--backends", nargs="+", help="only these; flex is FlexAttention")
    args = parser.parse_args()
    causal = not args.full
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {'causal' if causal else 'full'}, bf16")
    print(f"{'backend':14} heads length  forward backward     both  TFLOP/s     error")
    for size, length in itertools.product(args.head_sizes, args.lengths):
        runs = find_runs(size, causal, args.groups, length, args.documents)
        for name, run in runs.items():
            if args.backends is None or name in args.backends:
                try:
                    speeds = measure(run, size, length, causal, args.groups, args.documents)
                    error = largest_error(run, size, causal, args.groups, args.documents)
                except Exception as failure:  # one kernel's failure must not hide the others' figures
                    print(f"{name:14} {size:5} {length:6}  {type(failure).__name__}: {str(failure)[:90]}", flush=True)
                    continue
                figures = " ".join(f"{speed:8.0f}" for speed in speeds)
                print(f"{name:14} {size:5} {length:6} {figures}           {error:.1e}", flush=True)


def find_runs(size: int, causal: bool, groups: int, length: int, documents: int) -> dict[str, Run]:
    """Collect what can run here, each as a function of query, key and value."""
    request = AttentionRequest(
        head_size=size,
        dtype=torch.bfloat16,
        device_type="cuda",
        causal=causal,
        gqa=groups > 1,
        documents=documents > 1,
        sequence_length=length,
    )
    backends = find_implementations("megatron.kernels.attention", AttentionBackend)
    usable = [backend for backend in backends.values() if backend.name != "unfused" and not backend.why_not(request)]
    usable.sort(key=lambda backend: -backend.preference(request))
    runs: dict[str, Run] = {
        backend.name: partial(attend_apart, backend, documents, {}, scale=size**-0.5, causal=causal, dropout=0.0)
        for backend in usable
    }
    return runs if documents > 1 else {**runs, "flex": build_flex(size, causal)}


def attend_apart(
    backend: AttentionBackend, documents: int, prepared: dict[int, Any], *tensors: Tensor, **options: Any
) -> Tensor:
    """Call a backend, with as many documents in each sample; what it reads of them is prepared once a length."""
    length, batch = tensors[0].shape[:2]
    if documents > 1 and length not in prepared:
        ids = torch.arange(length, device="cuda", dtype=torch.int32) * documents // length
        prepared[length] = backend.prepare_documents(ids.expand(batch, -1))
    return backend.attend(*tensors, documents=prepared.get(length), **options)


def build_flex(size: int, causal: bool) -> Run:
    """Compile FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        here = query.shape[0]
        if causal and here not in masks:
            masks[here] = create_block_mask(lambda b, h, i, j: i >= j, None, None, here, here, device="cuda")
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        output: Tensor = compiled(query, key, value, block_mask=masks.get(here), scale=size**-0.5, enable_gqa=grouped)
        return output.permute(2, 0, 1, 3)

    return run


def make_heads(size: int, length: int, tokens: int, groups: int) -> list[Tensor]:
    """Draw query, key, value and the gradient of the output, [s, b, n, d]."""
    generator = torch.Generator("cuda").manual_seed(0)
    heads, batch = CHANNELS // size, max(1, tokens // length)
    counts = (heads, heads // groups, heads // groups, heads)
    shapes = [(length, batch, count, size) for count in counts]
    tensors = [torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16) for shape in shapes]
    return [*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]]


def measure(run: Run, size: int, length: int, causal: bool, groups: int, documents: int) -> list[float]:
    """Return TFLOP/s of forward, backward and both."""
    from triton.testing import do_bench

    query, key, value, grad = make_heads(size, length, TOKENS, groups)
    output = run(query, key, value)
    bench = partial(do_bench, warmup=20, rep=100, return_mode="median")
    forward = bench(lambda: run(query, key, value))
    backward = bench(lambda: torch.autograd.grad(output, (query, key, value), grad, retain_graph=True))
    flops = 4 * query.shape[1] * CHANNELS * length * length / documents / (2 if causal else 1)
    return [
        flops / forward / 1e9,
        BACKWARD * flops / backward / 1e9,
        (1 + BACKWARD) * flops / (forward + backward) / 1e9,
    ]


def largest_error(run: Run, size: int, causal: bool, groups: int, documents: int) -> float:
    """Return the largest relative error of output and gradients against fp64, at 1024 tokens."""
    *tensors, grad = make_heads(size, 1024, 1024, groups)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = run(*tensors)
    expected = attend_apart(REFERENCE, documents, {}, *exact, scale=size**-0.5, causal=causal, dropout=0.0)
    actual = [output, *torch.autograd.grad(output, tensors, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, wanted, strict=True))


if __name__ == "__main__":
    main()
