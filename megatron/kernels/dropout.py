"""Dropout before the residual sum, with the bias of the product before it folded in: in plain torch, and fused.

The fused one is a function of a key, which is drawn from torch's generator, and of each element's index. So backward
draws the mask again instead of keeping it; whoever restores torch's generator, as recompute does, gets the same mask;
ranks that each hold a part of a tensor draw the mask of the whole; and as the key stays on the device, a captured graph
draws anew in each replay.
"""

from __future__ import annotations

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
from megatron.kernels.philox import drop_threshold, keep_factors

KEY_RANGE = 2**62


def dropout_add(x: Tensor, residual: Tensor | None, probability: float, bias: Tensor | None = None) -> Tensor:
    """Compute residual + dropout(x + bias), drawing from torch's generator of x's device.

    Args:
        x: [..., h].
        residual: as x, or a stream in fp32; None: nothing is added.
        probability: of an element of x to become zero; the others grow by 1 / (1 - probability).
        bias: [h].
    """
    dropped = F.dropout(x if bias is None else x + bias, probability)
    return dropped if residual is None else residual + dropped


def fused_dropout_add(
    x: Tensor, residual: Tensor | None, probability: float, bias: Tensor | None = None, *, first: int = 0
) -> Tensor:
    """Compute `dropout_add` in one pass, with one number of torch's generator as the key of all masks.

    Args:
        x: see `dropout_add`, as for `residual` and `bias`.
        residual: see there.
        probability: rounded to 1/65536.
        bias: see there.
        first: index of x's first element in the tensor that it is a part of; the ranks that hold the others have the
            same state of torch's generator.
    """
    key = torch.randint(KEY_RANGE, (1,), device=x.device)
    if falls_back("dropout", _why_not(x, residual, bias)):
        return _dropout_add_cpu(x, bias, residual, key, first, probability)
    total: Tensor = _dropout_add(x, bias, residual, key, first, probability)
    return total


def _why_not(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> str | None:
    if residual is not None and residual.dtype not in (x.dtype, torch.float32):
        return "the residual stream has neither the dtype of what is added nor fp32"
    if residual is not None and residual.shape != x.shape:
        return "the residual stream has another shape than what is added"
    if bias is not None and bias.dtype != x.dtype:
        return "the bias has another dtype than what it is added to"
    return why_not_computed(x.dtype)


def _dropout_add_cuda(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, key: Tensor, first: int, probability: float
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    kernel, (device, stream), columns = load_kernel("dropout"), place(x), x.shape[-1]
    rows = x.numel() // columns if columns else 0
    out = torch.empty_like(x if residual is None else residual)
    kernel.forward(
        address(x),
        address(bias),
        address(residual),
        address(out),
        address(key),
        rows,
        first,
        columns,
        kernel.chunks(rows, columns, DTYPE_CODES[x.dtype], False, device),
        drop_threshold(probability),
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[out.dtype],
        device,
        stream,
    )
    return out


def _backward_cuda(
    grad: Tensor, key: Tensor, first: int, probability: float, dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    kernel, (device, stream), columns = load_kernel("dropout"), place(grad), grad.shape[-1]
    rows = grad.numel() // columns if columns else 0
    chunks = kernel.chunks(rows, columns, DTYPE_CODES[dtype], True, device)
    grad_x, grad_bias = _backward_fake(grad, key, first, probability, dtype, biased)
    partial = grad.new_empty((chunks, columns), dtype=torch.float32) if biased else None
    kernel.backward(
        address(grad),
        address(grad_x),
        address(grad_bias) if biased else 0,
        address(partial),
        address(key),
        rows,
        first,
        columns,
        chunks,
        drop_threshold(probability),
        DTYPE_CODES[dtype],
        DTYPE_CODES[grad.dtype],
        device,
        stream,
    )
    return grad_x, grad_bias


def _dropout_add_cpu(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, key: Tensor, first: int, probability: float
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    biased = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    factors = keep_factors(x.shape, key, first, drop_threshold(probability))
    dropped = torch.where(factors == 0, 0.0, biased * factors)  # a dropped infinity is zero, not NaN
    total = dropped if residual is None else residual + dropped
    return total.to(x.dtype if residual is None else residual.dtype).contiguous()


def _backward_cpu(
    grad: Tensor, key: Tensor, first: int, probability: float, dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor]:
    factors = keep_factors(grad.shape, key, first, drop_threshold(probability))
    grad_x = torch.where(factors == 0, 0.0, grad.float() * factors)
    grad_bias = grad_x.flatten(0, -2).sum(0).to(dtype) if biased else grad.new_empty(0, dtype=dtype)
    return grad_x.to(dtype).contiguous(), grad_bias


def _dropout_add_fake(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, key: Tensor, first: int, probability: float
) -> Tensor:
    return (x if residual is None else residual).new_empty(x.shape)


def _backward_fake(
    grad: Tensor, key: Tensor, first: int, probability: float, dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor]:
    grad_bias = grad.new_empty(grad.shape[-1:] if biased else 0, dtype=dtype)
    return grad.new_empty(grad.shape, dtype=dtype), grad_bias


_dropout_add = Operator(
    "dropout_add(Tensor x, Tensor? bias, Tensor? residual, Tensor key, int first, float probability) -> Tensor",
    cuda=_dropout_add_cuda,
    cpu=_dropout_add_cpu,
    fake=_dropout_add_fake,
)
_backward = Operator(
    "dropout_add_backward(Tensor grad, Tensor key, int first, float probability, ScalarType dtype, bool biased)"
    " -> (Tensor, Tensor)",
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, residual, key, ctx.first, ctx.probability = inputs
    ctx.save_for_backward(key)
    ctx.dtype, ctx.biased, ctx.added = x.dtype, bias is not None, residual is not None


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    (key,) = ctx.saved_tensors
    grad_x, grad_bias = _backward(grad, key, ctx.first, ctx.probability, ctx.dtype, ctx.biased)
    return grad_x, grad_bias if ctx.biased else None, grad if ctx.added else None, None, None, None


_dropout_add.define_gradient(_gradients, _keep)
