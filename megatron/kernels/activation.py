"""Nonlinearities of the MLP with the bias of the product before them folded in: in plain torch, and fused.

A gated one takes [..., 2 f], the gate in the first half of the last dim and the other projection ("up") in the second,
and gives [..., f] (Shazeer 2020, "GLU variants improve transformer"); the others keep the shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.build import load_kernel
from megatron.kernels.operator import (
    DTYPE_CODES,
    Operator,
    address,
    falls_back,
    place,
    why_not_computed,
)

Activation = Callable[..., Tensor]


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x Phi(x), exact (Hendrycks and Gimpel 2016)."""
    return F.gelu(_add(x, bias))


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the tanh approximation of `gelu` that GPT-2 was trained with."""
    return F.gelu(_add(x, bias), approximate="tanh")


def squared_relu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute max(x, 0)^2 (So et al. 2021, "Primer")."""
    return F.relu(_add(x, bias)).square()


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute silu(gate) x up."""
    gate, up = _add(x, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute gelu(gate) x up."""
    gate, up = _add(x, bias).chunk(2, dim=-1)
    return F.gelu(gate) * up


def geglu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute gelu_tanh(gate) x up."""
    gate, up = _add(x, bias).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "squared_relu": squared_relu,
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu_tanh": geglu_tanh,
}
"""By the name that `--activation-function` knows."""

KINDS = {"gelu": 0, "gelu_tanh": 1, "squared_relu": 2, "swiglu": 3, "geglu": 4, "geglu_tanh": 5}
"""Their numbers in `csrc/activation/activation.h`."""
GATED = frozenset({"swiglu", "geglu", "geglu_tanh"})


def fused_activation(kind: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the activation called `kind` in one pass over x, and its gradients, the bias's too, in one more."""
    reason = why_not_computed(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        reason = "the bias has another dtype than what it is added to"
    if falls_back("activation", reason):
        return ACTIVATIONS[kind](x, bias)
    result: Tensor = _activation(x, bias, kind)
    return result


FUSED_ACTIVATIONS: dict[str, Activation] = {name: functools.partial(fused_activation, name) for name in ACTIVATIONS}
"""The same, fused."""


def _width(x: Tensor, kind: str) -> int:
    return x.shape[-1] // 2 if kind in GATED else x.shape[-1]


def _activation_cuda(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    kernel, (device, stream), columns, code = load_kernel("activation"), place(x), _width(x, kind), DTYPE_CODES[x.dtype]
    out = x.new_empty((*x.shape[:-1], columns))
    rows = out.numel() // columns if columns else 0
    chunks = kernel.chunks(rows, columns, KINDS[kind], code, False, device)
    kernel.forward(address(x), address(bias), address(out), rows, columns, chunks, KINDS[kind], code, device, stream)
    return out


def _activation_backward_cuda(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    grad, x, bias = grad.contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    kernel, (device, stream), columns, code = load_kernel("activation"), place(x), _width(x, kind), DTYPE_CODES[x.dtype]
    rows = grad.numel() // columns if columns else 0
    chunks = kernel.chunks(rows, columns, KINDS[kind], code, True, device)
    grad_x, grad_bias = torch.empty_like(x), _empty_bias_gradient(x, bias)
    partial = None if bias is None else x.new_empty((chunks, x.shape[-1]), dtype=torch.float32)
    kernel.backward(
        address(x),
        address(bias),
        address(grad),
        address(grad_x),
        0 if bias is None else address(grad_bias),
        address(partial),
        rows,
        columns,
        chunks,
        KINDS[kind],
        code,
        device,
        stream,
    )
    return grad_x, grad_bias


def _empty_bias_gradient(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(0 if bias is None else bias.shape)


def _activation_cpu(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    wide = x.float()
    return ACTIVATIONS[kind](wide, None if bias is None else bias.float()).to(x.dtype).contiguous()


def _activation_backward_cpu(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    wide, grad = _add(x.float(), None if bias is None else bias.float()), grad.float()
    if kind in GATED:
        gate, up = wide.chunk(2, dim=-1)
        plain: dict[str, Activation] = {"swiglu": F.silu, "geglu": gelu, "geglu_tanh": gelu_tanh}
        grad_x = torch.cat((_through(kind, grad * up, gate), grad * plain[kind](gate)), dim=-1)
    else:
        grad_x = _through(kind, grad, wide)
    grad_bias = _empty_bias_gradient(x, bias) if bias is None else grad_x.flatten(0, -2).sum(0).to(x.dtype)
    return grad_x.to(x.dtype).contiguous(), grad_bias


def _through(kind: str, grad: Tensor, x: Tensor) -> Tensor:
    """Multiply by the derivative of the nonlinearity itself, the gate's in a gated one."""
    if kind == "swiglu":
        result: Tensor = torch.ops.aten.silu_backward(grad, x)
    elif kind == "squared_relu":
        result = grad * 2 * F.relu(x)
    else:
        approximate = "tanh" if kind in ("gelu_tanh", "geglu_tanh") else "none"
        result = torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    return result


def _activation_fake(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], _width(x, kind)))


def _activation_backward_fake(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_bias_gradient(x, bias)


_activation = Operator(
    "activation(Tensor x, Tensor? bias, str kind) -> Tensor",
    cuda=_activation_cuda,
    cpu=_activation_cpu,
    fake=_activation_fake,
)
_activation_backward = Operator(
    "activation_backward(Tensor grad, Tensor x, Tensor? bias, str kind) -> (Tensor, Tensor)",
    cuda=_activation_backward_cuda,
    cpu=_activation_backward_cpu,
    fake=_activation_backward_fake,
)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    x, bias = ctx.saved_tensors
    if grad is None:
        return None, None, None
    grad_x, grad_bias = _activation_backward(grad, x, bias, ctx.kind)
    return grad_x, None if bias is None else grad_bias, None


_activation.define_gradient(_gradients, _keep)
