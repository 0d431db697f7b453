"""How a call is timed and judged on a GPU: for the tools that measure kernels."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROTATE_OVER_BYTES = 400e6
"""Calls in a row work on different tensors of at least so many bytes together, which no cache holds."""
SPIN_CYCLES = 30_000_000
"""The device is kept busy while calls are queued, so that the host's speed does not enter into their time."""
ROUNDS = 7

Tensors = tuple[Tensor, ...]
Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation at one size: how to make its inputs, and the functions that compute it."""

    name: str
    size: str
    make: Callable[[int], Tensors]
    """Inputs for some number of rows; gradients are taken of those that require one."""
    rows: int
    fused: Function
    plain: Function
    forward_bytes: float
    """What must be moved at the least: every input read once, every output written once."""
    backward_bytes: float
    flops: float = 0.0
    """Of both passes, where arithmetic and not memory is the limit."""
    others: dict[str, Function] = field(default_factory=dict)
    judged_rows: int | None = 512
    """Rows of the comparison with fp64; None where results are random."""


@dataclass(frozen=True)
class Times:
    """Seconds of one call on the device; what the host needs to queue it; bytes of the device's memory at the peak."""

    forward: float
    backward: float
    host: float
    peak_bytes: float

    @property
    def both(self) -> float:
        """Forward and backward, for a comparison with those that do backward's work in forward."""
        return self.forward + self.backward


def gpu_time(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
    """Return the time on the device of one of `calls`, and the time that the host needs to queue one, in seconds."""
    device_times, host_times = [], []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SPIN_CYCLES)
        begin.record()
        started = time.perf_counter()
        kept = [call() for call in calls]  # outputs in memory of their own, as in training
        host_times.append((time.perf_counter() - started) / len(calls))
        end.record()
        end.synchronize()
        device_times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        del kept
    return statistics.median(device_times[1:]), statistics.median(host_times[1:])


@functools.cache
def copy_time(num_bytes: float) -> float:
    """Time of a copy on the device that reads and writes `num_bytes` together."""
    sets = number_of_sets(num_bytes)
    sources = [torch.empty(int(num_bytes / 2), dtype=torch.uint8, device="cuda").random_() for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    calls = [functools.partial(to.copy_, source) for to, source in zip(targets, sources, strict=True)]
    return gpu_time(calls)[0]


def copy_rate() -> float:
    """Bytes a second that a copy of tensors too large for any cache reads and writes together."""
    num_bytes = 2.0**31
    return num_bytes / copy_time(num_bytes)


def matrix_rate() -> float:
    """Operations a second of a large product in bf16."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    calls = [functools.partial(torch.mm, left, right)] * 5
    return 2.0 * size**3 / gpu_time(calls)[0]


def number_of_sets(num_bytes: float) -> int:
    """Tensors of so many bytes to go round."""
    return max(3, min(24, int(ROTATE_OVER_BYTES // num_bytes) + 1))


def pass_times(operation: Operation, function: Function) -> Times:
    """Time forward and backward of one function."""
    sets = [operation.make(operation.rows) for _ in range(number_of_sets(operation.forward_bytes))]
    peak = peak_bytes(function, sets[0])
    forward, host = gpu_time([functools.partial(function, *inputs) for inputs in sets])
    calls = []
    for inputs in sets:
        outs, leaves = outputs(function, inputs), leaves_of(inputs)
        grads = [torch.randn_like(x) for x in outs]
        calls.append(functools.partial(torch.autograd.grad, outs, leaves, grads, retain_graph=True))
    backward, _ = gpu_time(calls)
    return Times(forward, backward, host, peak)


def peak_bytes(function: Function, inputs: Tensors) -> float:
    """Memory that one forward and backward take beyond the inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outs = outputs(function, inputs)
    torch.autograd.grad(outs, leaves_of(inputs), [torch.ones_like(x) for x in outs])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def errors(operation: Operation) -> tuple[float, float] | None:
    """Return the largest distance from fp64 among results and gradients, of the fused function and of plain torch."""
    if operation.judged_rows is None:
        return None
    inputs = operation.make(min(operation.rows, operation.judged_rows))
    inputs64 = tuple(x.detach().double().requires_grad_() if x.requires_grad else x for x in inputs)
    exact = results(operation.plain, inputs64)
    plain = results(operation.plain, inputs)
    fused = results(
        operation.fused, tuple(x.detach().clone().requires_grad_() if x.requires_grad else x for x in inputs)
    )
    return distance(fused, exact), distance(plain, exact)


def results(function: Function, inputs: Tensors) -> list[Tensor]:
    """Return outputs and gradients, for gradients of the outputs that depend on their shapes alone."""
    outs = outputs(function, inputs)
    generator = torch.Generator("cuda").manual_seed(3)
    grads = [torch.randn(x.shape, device="cuda", generator=generator).to(torch.bfloat16).to(x.dtype) for x in outs]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves_of(inputs), grads)]


def outputs(function: Function, inputs: Tensors) -> Tensors:
    """Call a function of one result or several."""
    out = function(*inputs)
    return out if isinstance(out, tuple) else (out,)


def leaves_of(inputs: Tensors) -> list[Tensor]:
    """Pick the inputs that gradients are taken of."""
    return [x for x in inputs if x.requires_grad]


def distance(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative distance ||x - exact|| / ||exact|| of any of the tensors."""
    return max(float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True))
