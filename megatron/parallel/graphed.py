"""Work of a GPU that the host gives it once, recorded as a CUDA graph, and that it then repeats for each micro-batch.

A host needs some microseconds to launch a kernel, and more for what Python does around it. Where the kernels are
shorter than that, the GPU waits; a graph is one launch, however many kernels it holds. What is repeated is what was
recorded: the same kernels on tensors of the same shapes at the same addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

WARM_UPS = 3
"""Passes before the recording, in which libraries load kernels and choose among them: a recording allows neither."""

MODE = "thread_local"
"""Of the recording: threads that pin batches or watch collectives may go on with calls that it forbids this one."""


class Graphed:
    """A function of one tensor whose forward and backward passes are one CUDA graph each, recorded in the first call.

    Every backward pass has to come before the next forward one: activations, result and gradients of all calls lie at
    the same addresses. They stay allocated between the calls, in a pool of their own. Gradients of parameters add up as
    ever; that of the tensor is for the operation that made it.

    Args:
        function: takes one tensor and gives one, without asking anything of the host. What it draws it draws from
            torch's generator, and each call draws anew, as without a graph.
        modules: whose parameters it reads; all have gradients, and their addresses must not change.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], modules: Sequence[nn.Module]) -> None:
        self._function = _Function(function, modules)
        self._parameters = tuple(self._function.parameters())
        self._recording: _Recording | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Compute function(x), for gradients.

        Raises:
            ValueError: x is not as in the first call.
        """
        if self._recording is None:
            self._recording = _Recording(self._function, x)
        result: Tensor = _Replay.apply(self._recording, x, *self._parameters)
        return result

    def peak_bytes(self) -> int:
        """Give the most memory that the GPU held so far, with what lies idle in the pool; 0 before the first call.

        PyTorch counts that as reserved, like memory that it could use for something else, and not as allocated.
        """
        return 0 if self._recording is None else self._recording.peak_bytes()


class _Function(nn.Module):
    """A function of a tensor that reads the parameters of modules."""

    def __init__(self, function: Callable[[Tensor], Tensor], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._function = function
        self._read = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)

    def with_stand_ins(self) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]:
        """Return the function, reading other leaves of the parameters' memory, and these.

        The parameters themselves have hooks, of an engine that takes their gradients, for which autograd would make
        the stream that they were registered on wait for the one that is recorded: that ends a recording.
        """
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in self.named_parameters()}
        return lambda x: functional_call(self, leaves, (x,)), tuple(leaves.values())


class _Recording:
    """Both graphs, and the tensors through which they are spoken to."""

    def __init__(self, of: _Function, x: Tensor) -> None:
        self.passes = 0
        self._parameters = tuple(of.parameters())
        function, leaves = of.with_stand_ins()
        start = x.detach().clone().requires_grad_()
        wanted = (start, *leaves)
        drawn = torch.cuda.get_rng_state(x.device)
        _warm_up(function, start, wanted)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, capture_error_mode=MODE):
            end = function(start)
        self._grad_end = torch.empty_like(end)
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode=MODE):
            grad_start, *gradients = torch.autograd.grad(end, wanted, self._grad_end)
        torch.cuda.set_rng_state(drawn, x.device)  # as if nothing had been computed yet
        self._start, self._end = start.detach(), end.detach()
        self._grad_start, self._gradients = grad_start, gradients
        self._peak_before = torch.cuda.max_memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        self._idle = _idle_bytes(self._forward.pool())

    def peak_bytes(self) -> int:
        """Give the most memory held so far; idle is what was allocated while the graphs were recorded."""
        return max(self._peak_before, torch.cuda.max_memory_allocated(self._start.device) + self._idle)

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the forward pass on x.

        Raises:
            ValueError: x is not as in the recording.
        """
        if (x.shape, x.dtype, x.device) != (self._start.shape, self._start.dtype, self._start.device):
            raise ValueError(
                f"what was recorded takes {self._start.dtype} {tuple(self._start.shape)}, not {x.dtype} "
                f"{tuple(x.shape)}: a graph repeats the same work"
            )
        self._spare_gradients()
        self.passes += 1
        self._start.copy_(x)
        self._forward.replay()
        return self._end.detach()

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Repeat the backward pass of the last forward pass; returns the gradients of x and of the parameters."""
        self.passes += 1
        self._grad_end.copy_(grad)
        self._backward.replay()
        return tuple(gradient.detach() for gradient in (self._grad_start, *self._gradients))

    def _spare_gradients(self) -> None:
        """Copy gradients that nobody has taken yet.

        Autograd does not copy a parameter's first gradient: `.grad` is the memory that the next pass writes to.
        """
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr():
                parameter.grad = parameter.grad.clone()


def _warm_up(function: Callable[[Tensor], Tensor], start: Tensor, wanted: Sequence[Tensor]) -> None:
    side = torch.cuda.Stream(start.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            end = function(start)
            torch.autograd.grad(end, wanted, torch.zeros_like(end))
    torch.cuda.current_stream().wait_stream(side)


def _idle_bytes(pool: tuple[int, int]) -> int:
    """Count what a pool has beyond the tensors that are alive."""
    segments = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) == pool]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


class _Replay(torch.autograd.Function):
    """The graphs as one operation, whose inputs are the parameters as well, so that they get their gradients."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, x: Tensor, *parameters: Tensor) -> Tensor:
        result = recording.forward(x)
        ctx.recording, ctx.passes = recording, recording.passes
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.passes != ctx.recording.passes:
            raise RuntimeError("another pass has taken the activations' place: backward has to follow its forward pass")
        return None, *ctx.recording.backward(grad)
