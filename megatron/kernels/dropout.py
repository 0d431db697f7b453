"""Dropout before the residual sum, with the bias of the product before it folded in: in plain torch, and fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.build import load_kernel
from megatron.kernels.operator import (
    DTYPE_CODES,
    address,
    define_gradient,
    define_operator,
    falls_back,
    place,
    why_not_computed,
)

KEY_RANGE = 2**62


def dropout_add(x: Tensor, residual: Tensor, probability: float, bias: Tensor | None = None) -> Tensor:
    """Compute residual + dropout(x + bias), drawing from torch's generator of x's device.

    Args:
        x: [..., h].
        residual: as x, or a stream in fp32.
        probability: of an element of x to become zero; the others grow by 1 / (1 - probability).
        bias: [h].
    """
    return residual + F.dropout(x if bias is None else x + bias, probability)


def fused_dropout_add(x: Tensor, residual: Tensor, probability: float, bias: Tensor | None = None) -> Tensor:
    """Compute `dropout_add` in one pass; backward draws the mask anew instead of keeping it.

    One number is taken from torch's generator and is the key of a counter-based one (Salmon et al. 2011), so whoever
    restores torch's generator, as recompute does, gets the same mask. The probability is rounded to 1/65536.
    """
    if falls_back("dropout", _why_not(x, residual, bias)):
        return dropout_add(x, residual, probability, bias)
    key = torch.randint(KEY_RANGE, (1,), device=x.device)
    total: Tensor = _dropout_add(x, bias, residual, key, probability)
    return total


def _why_not(x: Tensor, residual: Tensor, bias: Tensor | None) -> str | None:
    if residual.dtype not in (x.dtype, torch.float32):
        return "the residual stream has neither the dtype of what is added nor fp32"
    if residual.shape != x.shape:
        return "the residual stream has another shape than what is added"
    if bias is not None and bias.dtype != x.dtype:
        return "the bias has another dtype than what it is added to"
    return why_not_computed(x.dtype)


def _dropout_add_cuda(x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, probability: float) -> Tensor:
    x, residual, bias = x.contiguous(), residual.contiguous(), None if bias is None else bias.contiguous()
    kernel, (device, stream), columns = load_kernel("dropout"), place(x), x.shape[-1]
    rows = x.numel() // columns if columns else 0
    out = torch.empty_like(residual)
    kernel.forward(
        address(x),
        address(bias),
        address(residual),
        address(out),
        address(key),
        rows,
        columns,
        kernel.chunks(rows, columns, DTYPE_CODES[x.dtype], device),
        probability,
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[residual.dtype],
        device,
        stream,
    )
    return out


def _backward_cuda(
    grad: Tensor, key: Tensor, probability: float, dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    kernel, (device, stream), columns = load_kernel("dropout"), place(grad), grad.shape[-1]
    rows = grad.numel() // columns if columns else 0
    chunks = kernel.chunks(rows, columns, DTYPE_CODES[dtype], device)
    grad_x, grad_bias = _backward_fake(grad, key, probability, dtype, biased)
    partial = grad.new_empty((chunks, columns), dtype=torch.float32) if biased else None
    kernel.backward(
        address(grad),
        address(grad_x),
        address(grad_bias) if biased else 0,
        address(partial),
        address(key),
        rows,
        columns,
        chunks,
        probability,
        DTYPE_CODES[dtype],
        DTYPE_CODES[grad.dtype],
        device,
        stream,
    )
    return grad_x, grad_bias


def _factors(like: Tensor, key: Tensor, probability: float) -> Tensor:
    """Draw 0 or 1 / (1 - probability) for each element: a function of the key alone."""
    generator = torch.Generator().manual_seed(int(key))
    return (torch.rand(like.shape, generator=generator) >= probability).float() / (1 - probability)


def _dropout_add_cpu(x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, probability: float) -> Tensor:
    wide = x.float() if bias is None else x.float() + bias.float()
    return (residual + wide * _factors(x, key, probability)).to(residual.dtype).contiguous()


def _backward_cpu(
    grad: Tensor, key: Tensor, probability: float, dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor]:
    grad_x = grad.float() * _factors(grad, key, probability)
    grad_bias = grad_x.flatten(0, -2).sum(0).to(dtype) if biased else grad.new_empty(0, dtype=dtype)
    return grad_x.to(dtype).contiguous(), grad_bias


def _dropout_add_fake(x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor, probability: float) -> Tensor:
    return residual.new_empty(residual.shape)


def _backward_fake(
    grad: Tensor, key: Tensor, probability: float, dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor]:
    grad_bias = grad.new_empty(grad.shape[-1:] if biased else 0, dtype=dtype)
    return grad.new_empty(grad.shape, dtype=dtype), grad_bias


_dropout_add = define_operator(
    "dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor key, float probability) -> Tensor",
    cuda=_dropout_add_cuda,
    cpu=_dropout_add_cpu,
    fake=_dropout_add_fake,
)
_backward = define_operator(
    "dropout_add_backward(Tensor grad, Tensor key, float probability, ScalarType dtype, bool biased)"
    " -> (Tensor, Tensor)",
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, _, key, ctx.probability = inputs
    ctx.save_for_backward(key)
    ctx.dtype, ctx.biased = x.dtype, bias is not None


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    (key,) = ctx.saved_tensors
    grad_x, grad_bias = _backward(grad, key, ctx.probability, ctx.dtype, ctx.biased)
    return grad_x, grad_bias if ctx.biased else None, grad, None, None


define_gradient(_dropout_add, _gradients, _keep)
