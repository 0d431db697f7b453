#!/usr/bin/env python3
"""Measure every attention backend that this machine can run: time, TFLOP/s, the error, and what `auto` would take.

    python tools/benchmark_attention.py --head-sizes 64 128 --lengths 2048 8192 32768
    python tools/benchmark_attention.py --head-sizes 128 --lengths 8192 --documents 8 --window 1024 --dropout 0.1

Random bf16, 16k tokens of 2048 channels (at least one sample), medians. FLOPs are 4 b n d for each pair of a query and
a key that it sees, and 2.5 times that in backward. PyTorch's compiled FlexAttention runs beside the backends, and the
speeds of both passes are also given as parts of its and of cuDNN's. Errors are those of output and gradients, the
largest, against fp64 at 1024 tokens without dropout; that of `unfused` shows what bf16 costs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention.interface import AttentionBackend, AttentionRequest
from megatron.kernels.attention.mask import pairs_seen
from megatron.kernels.attention.pick import pick_attention
from megatron.kernels.attention.unfused import BACKEND as REFERENCE
from megatron.kernels.registry import find_implementations

TOKENS, CHANNELS = 16384, 2048
BACKWARD = 2.5  # products of backward over those of forward
CALLS = 4
"""In a row under the clock, as in training: the host's time shows only where it is longer than the device's."""
WEIGHT_BYTES = 4 * 2**30
"""Of the s x s weights of `unfused`, in bf16: it keeps several such tensors, and is left out where they are larger."""
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        size: channels of a head.
        length: tokens of a sample.
        batch: samples.
        causal: whether queries see no later keys.
        groups: query heads that share a key head.
        documents: of the same length in each sample, kept apart.
        window: how many keys a query sees, 0: all.
        softcap: bound of the logits, 0: none.
        dropout: probability of dropping a weight.
    """

    size: int
    length: int
    batch: int
    causal: bool
    groups: int
    documents: int
    window: int
    softcap: float
    dropout: float

    def request(self) -> AttentionRequest:
        """Say what a backend must be able to do."""
        return AttentionRequest(
            head_size=self.size,
            dtype=torch.bfloat16,
            device_type="cuda",
            causal=self.causal,
            gqa=self.groups > 1,
            documents=self.documents > 1,
            window=self.window > 0,
            softcap=self.softcap > 0,
            dropout=self.dropout,
            sequence_length=self.length,
        )

    def options(self) -> dict[str, Any]:
        """Give the arguments of `Attend` but tensors and documents."""
        return {
            "scale": self.size**-0.5,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "dropout": self.dropout,
        }

    def flops(self) -> float:
        """Count those of forward."""
        each = self.length // self.documents
        return 4.0 * pairs_seen(each, each, self.causal, self.window) * self.documents * self.batch * CHANNELS


@dataclass(frozen=True)
class Result:
    """Milliseconds of forward and backward, and their TFLOP/s together."""

    forward: float
    backward: float
    speed: float


def main() -> None:
    """Print one line a backend, head size and length."""
    args = parse()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; milliseconds, TFLOP/s")
    shared = {
        "causal": not args.full,
        "groups": args.groups,
        "documents": args.documents,
        "window": args.window,
        "softcap": args.softcap,
        "dropout": args.dropout,
    }
    print(", ".join(f"{name} {value}" for name, value in shared.items()))
    errors: dict[tuple[str, int], str] = {}
    for size, length in itertools.product(args.head_sizes, args.lengths):
        case = Case(size=size, length=length, batch=max(1, TOKENS // length), **shared)
        small = replace(case, length=1024, batch=1, dropout=0.0)
        results = {}
        for name, prepare in find_runs(case).items():
            if args.backends is None or name in args.backends:
                try:
                    results[name] = measure(prepare(case), case)
                    if (name, size) not in errors:
                        errors[name, size] = find_error(prepare(small), small)
                except Exception as failure:  # one kernel's must not hide the others' figures
                    print(f"{name}, heads of {size}, length {length}: {type(failure).__name__}: {str(failure)[:200]}")
        print_table(case, results, errors)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--groups", type=int, default=1, help="query heads that share a key head")
    parser.add_argument("--documents", type=int, default=1, help="of the same length in each sample, kept apart")
    parser.add_argument("--window", type=int, default=0, help="keys that a query sees")
    parser.add_argument("--softcap", type=float, default=0.0, help="bound of the logits")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability of dropping a weight")
    parser.add_argument("--full", action="store_true", help="without the causal mask")
    parser.add_argument("--backends", nargs="+", help="only these; flex is FlexAttention")
    return parser.parse_args()


def print_table(case: Case, results: dict[str, Result], errors: dict[tuple[str, int], str]) -> None:
    """Print the results, and what `auto` takes."""
    chosen, reason = pick_attention("auto", case.request())
    print(f"\nheads of {case.size}, length {case.length}; auto: {chosen.name}, {reason}")
    print(f"{'backend':14}  forward backward   TFLOP/s forward backward  of cuDNN  of flex     error")
    flops = case.flops() / 1e9
    for name, result in results.items():
        ratios = [
            f"{result.speed / results[other].speed:8.2f}" if other in results else " " * 8
            for other in ("sdpa_cudnn", "flex")
        ]
        speeds = f"{result.speed:9.0f} {flops / result.forward:7.0f} {BACKWARD * flops / result.backward:8.0f}"
        times = f"{result.forward:8.3f} {result.backward:8.3f}"
        print(
            f"{name:14} {times} {speeds}  {ratios[0]} {ratios[1]}   {errors.get((name, case.size), 'failed')}",
            flush=True,
        )


def find_runs(case: Case) -> dict[str, Callable[[Case], Run]]:
    """Collect what can run here, the one that `auto` takes first; each makes of a case what attends."""
    backends = find_implementations("megatron.kernels.attention", AttentionBackend)
    request = case.request()
    usable = [backend for backend in backends.values() if not backend.why_not(request)]
    usable.sort(key=lambda backend: -backend.preference(request))
    runs: dict[str, Callable[[Case], Run]] = {backend.name: partial(build_run, backend) for backend in usable}
    if 2 * case.batch * CHANNELS // case.size * case.length**2 > WEIGHT_BYTES:
        del runs["unfused"]
    return runs if case.dropout else {**runs, "flex": build_flex}


def build_run(backend: AttentionBackend, case: Case) -> Run:
    """Have a backend attend, with what it reads of the documents prepared."""
    ids = document_ids(case).expand(case.batch, -1)
    documents = backend.prepare_documents(ids) if case.documents > 1 else None
    return partial(backend.attend, documents=documents, **case.options())


def document_ids(case: Case) -> Tensor:
    """Say of which document each token is, int32 [s]."""
    return torch.arange(case.length, device="cuda", dtype=torch.int32) * case.documents // case.length


def build_flex(case: Case) -> Run:
    """Compile FlexAttention, with a mask that it knows by blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    ids = document_ids(case)

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j if case.causal else i >= 0
        if case.window:
            seen = seen & (i - j < case.window)
        return seen & (ids[i] == ids[j]) if case.documents > 1 else seen

    def cap(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return case.softcap * torch.tanh(logit / case.softcap)

    is_masked = case.causal or case.documents > 1
    mask = create_block_mask(is_seen, None, None, case.length, case.length, device="cuda") if is_masked else None

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output: Tensor = compiled(
            query,
            key,
            value,
            score_mod=cap if case.softcap else None,
            block_mask=mask,
            scale=case.size**-0.5,
            enable_gqa=case.groups > 1,
        )
        return output.permute(2, 0, 1, 3)

    return run


def make_heads(case: Case) -> list[Tensor]:
    """Draw query, key, value and the gradient of the output, [s, b, n, d]."""
    generator = torch.Generator("cuda").manual_seed(0)
    heads = CHANNELS // case.size
    counts = (heads, heads // case.groups, heads // case.groups, heads)
    shapes = [(case.length, case.batch, count, case.size) for count in counts]
    tensors = [torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16) for shape in shapes]
    return [*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]]


def measure(run: Run, case: Case) -> Result:
    """Time both passes."""
    from triton.testing import do_bench

    query, key, value, grad = make_heads(case)
    output = run(query, key, value)

    def bench(pass_once: Callable[[], object]) -> float:
        milliseconds: float = do_bench(
            lambda: [pass_once() for _ in range(CALLS)], warmup=20, rep=200, return_mode="median"
        )
        return milliseconds / CALLS

    forward = bench(lambda: run(query, key, value))
    backward = bench(lambda: torch.autograd.grad(output, (query, key, value), grad, retain_graph=True))
    return Result(forward, backward, (1 + BACKWARD) * case.flops() / (forward + backward) / 1e9)


def find_error(run: Run, case: Case) -> str:
    """Return the largest relative error of output and gradients against fp64, of one sample without dropout."""
    *tensors, grad = make_heads(case)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = build_run(REFERENCE, case)(*exact)
    output = run(*tensors)
    actual = [output, *torch.autograd.grad(output, tensors, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    return f"{max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, wanted, strict=True)):.1e}"


if __name__ == "__main__":
    main()
