"""What every fused operation shares: its registration with torch, and how a tensor crosses into a compiled kernel.

An operation is a `torch.library` operator, so that `torch.compile` keeps it whole and autograd knows its gradient. Its
CUDA implementation calls a kernel of `csrc`; the one for the CPU writes the same formula out in torch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

log = logging.getLogger(__name__)

NAMESPACE = "megatron"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Those that kernels compute with, by their numbers in `csrc/include/vector.cuh`."""


class Operator:
    """A fused operation. Called on a GPU without a compiler it goes straight to its kernel, past the dispatcher.

    Args:
        schema: name, arguments and results, in torch's notation.
        cuda: implementation by a compiled kernel.
        cpu: implementation in torch.
        fake: makes empty results of the right shapes, dtypes and strides.
    """

    def __init__(
        self, schema: str, *, cuda: Callable[..., Any], cpu: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, cuda, "CUDA")
        LIBRARY.impl(name, cpu, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        self.overload: Any = getattr(getattr(torch.ops, NAMESPACE), name).default
        """The same as torch knows it."""
        self._cuda = cuda
        self._function: Any = None

    def define_gradient(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Tell autograd the gradient; results that got none are handed to `backward` as None."""

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self._cuda(*inputs)
            setup(ctx, inputs, output)
            return output

        torch.library.register_autograd(self.overload, backward, setup_context=setup, lib=LIBRARY)
        # Not with a `setup_context`: torch would bind each call's arguments to the signature, longer than all the rest.
        straight = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type("Straight", (torch.autograd.Function,), straight)

    def __call__(self, *inputs: Any) -> Any:
        """Compute it; the arguments are those of the schema, in order."""
        if not goes_straight(inputs[0]):
            return self.overload(*inputs)
        if self._function is None or not torch.is_grad_enabled():
            return self._cuda(*inputs)
        return self._function.apply(*inputs)


def goes_straight(tensor: Tensor) -> bool:
    """Whether a kernel can be called on this tensor at once: it is a real one on a GPU, and nobody traces."""
    return tensor.is_cuda and type(tensor) in (Tensor, Parameter) and not torch.compiler.is_compiling()


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first element; 0 of none."""
    return 0 if tensor is None else tensor.data_ptr()


def place(tensor: Tensor) -> tuple[int, int]:
    """Device and stream on which a kernel that reads `tensor` is launched."""
    if tensor.device.type != "cuda":
        return 0, 0
    device = tensor.get_device()
    # What torch.cuda.current_stream().cuda_stream gives, without the object around it, which takes microseconds.
    return device, torch._C._cuda_getCurrentRawStream(device)


def why_not_computed(*dtypes: torch.dtype) -> str | None:
    """Say why kernels do not compute with tensors of such dtypes; None when they do."""
    foreign = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in DTYPE_CODES})
    return f"{' and '.join(foreign)} is not a type of the kernels" if foreign else None


def falls_back(operation: str, reason: str | None) -> bool:
    """Whether an operation is left to plain torch, which is said once for each reason."""
    if reason is None:
        return False
    if not torch.compiler.is_compiling():
        _say(operation, reason)
    return True


@functools.cache
def _say(operation: str, reason: str) -> None:
    log.warning("%s: computed by plain torch where %s", operation, reason)
