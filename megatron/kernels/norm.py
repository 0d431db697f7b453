"""LayerNorm and RMSNorm over the last dim, with the sum of the residual stream folded in where there is one.

Statistics and scaling are computed in fp32 whatever the dtypes; the result has the weight's dtype, which takes an fp32
residual stream to the dtype of the products. `weight_offset` is 1 for weights that are stored minus one.

| plain torch                | fused                            |
|----------------------------|----------------------------------|
| `layer_norm`, `rms_norm`   | `fused_norm`                     |
| `stream_norm`              | `fused_stream_norm`              |
| `add_norm`                 | `fused_add_norm`                 |
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
    goes_straight,
    place,
    why_not_computed,
)

MOST_COLUMNS = 16384


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, weight_offset: float = 0.0) -> Tensor:
    """Compute (x - mean) / sqrt(variance + epsilon) x weight + bias (Ba et al. 2016)."""
    shape, dtype = weight.shape, weight.dtype
    if weight_offset:
        weight = weight + weight_offset
    if x.dtype == dtype:
        return F.layer_norm(x, shape, weight, bias, epsilon)
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), shape, weight.float(), bias, epsilon).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, weight_offset: float = 0.0) -> Tensor:
    """Compute x / sqrt(mean(x^2) + epsilon) x weight (Zhang and Sennrich 2019)."""
    shape, dtype = weight.shape, weight.dtype
    if weight_offset:
        weight = weight + weight_offset
    if x.dtype == dtype:
        return F.rms_norm(x, shape, weight, epsilon)
    return F.rms_norm(x.float(), shape, weight.float(), epsilon).to(dtype)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, weight_offset: float = 0.0, centred: bool = True
) -> Tensor:
    """`layer_norm` where the mean is taken out (`centred`), else `rms_norm`, which has no bias."""
    if centred:
        return layer_norm(x, weight, bias, epsilon, weight_offset=weight_offset)
    return rms_norm(x, weight, epsilon, weight_offset=weight_offset)


def stream_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, weight_offset: float = 0.0, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Return a residual stream, to be used instead of x from here on, and its norm."""
    return x, norm(x, weight, bias, epsilon, weight_offset=weight_offset, centred=centred)


def add_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    *,
    weight_offset: float = 0.0,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """Add `delta` to a residual stream and normalise the sum.

    Returns:
        x + delta, and the norm of that.
    """
    stream = x + delta
    return stream, norm(stream, weight, bias, epsilon, weight_offset=weight_offset, centred=centred)


def fused_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, weight_offset: float = 0.0, centred: bool = True
) -> Tensor:
    """Compute `norm` in one pass over x, and its gradients in one more."""
    if falls_back("norm", _why_not(x, weight, bias)):
        return norm(x, weight, bias, epsilon, weight_offset=weight_offset, centred=centred)
    normed: Tensor = _norm(x, weight, bias, epsilon, weight_offset, centred)[0]
    return normed


def fused_stream_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, weight_offset: float = 0.0, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute `stream_norm`; backward adds the gradient that comes along the stream in its own pass."""
    if goes_straight(x) and _why_not(x, weight, bias) is None:
        stream, normed = _StreamNorm.apply(x, weight, bias, epsilon, weight_offset, centred)
        return stream, normed
    return x, fused_norm(x, weight, bias, epsilon, weight_offset=weight_offset, centred=centred)


def fused_add_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    *,
    weight_offset: float = 0.0,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute `add_norm` in one pass; backward adds the gradient that comes along the stream in its own."""
    reason = _why_not(x, weight, bias)
    if reason is None and (delta.dtype != weight.dtype or delta.shape != x.shape):
        reason = "what is added to the stream has another dtype than the weight, or another shape than the stream"
    if falls_back("norm", reason):
        return add_norm(x, delta, weight, bias, epsilon, weight_offset=weight_offset, centred=centred)
    stream, normed, _, _ = _add_norm(x, delta, weight, bias, epsilon, weight_offset, centred)
    return stream, normed


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if weight.numel() > MOST_COLUMNS:
        return f"rows are longer than {MOST_COLUMNS}"
    if x.dtype not in (weight.dtype, torch.float32):
        return "the stream has neither the weight's dtype nor fp32"
    if bias is not None and bias.dtype != weight.dtype:
        return "weight and bias differ in dtype"
    return why_not_computed(x.dtype, weight.dtype)


def _statistics(x: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Make room for mean, which RMSNorm has none of, and inverse deviation of each row."""
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(inverse) if centred else inverse.new_empty(0), inverse


def _add_norm_cuda(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    weight_offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the stream, which is x where there is no delta, its norm and its statistics."""
    x, weight = x.contiguous(), weight.contiguous()
    delta = None if delta is None else delta.contiguous()
    bias = None if bias is None else bias.contiguous()
    stream = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=weight.dtype)
    mean, inverse = _statistics(x, centred)
    load_kernel("norm").forward(
        address(x),
        address(delta),
        address(weight),
        address(bias),
        0 if delta is None else address(stream),
        address(normed),
        address(mean) if centred else 0,
        address(inverse),
        inverse.numel(),
        weight.numel(),
        epsilon,
        weight_offset,
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[weight.dtype],
        *place(x),
    )
    return stream, normed, mean, inverse


def _norm_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, weight_offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _add_norm_cuda(x, None, weight, bias, epsilon, weight_offset, centred)[1:]


def _norm_backward_cuda(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight_offset: float,
    centred: bool,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_normed, stream, weight = grad_normed.contiguous(), stream.contiguous(), weight.contiguous()
    grad_stream = None if grad_stream is None else grad_stream.contiguous()
    kernel, (device, cuda_stream) = load_kernel("norm"), place(stream)
    rows, columns = inverse.numel(), weight.numel()
    if rows == 0:
        return torch.empty_like(stream), torch.zeros_like(weight), weight.new_zeros(columns if biased else 0)
    partial_rows = kernel.partial_rows(rows, device)
    partial = stream.new_empty((1 + biased, partial_rows, columns), dtype=torch.float32)
    grad_x, grad_weight = torch.empty_like(stream), torch.empty_like(weight)
    grad_bias = torch.empty_like(weight) if biased else weight.new_empty(0)
    kernel.backward(
        address(grad_normed),
        address(grad_stream),
        address(stream),
        address(weight),
        address(mean) if centred else 0,
        address(inverse),
        address(grad_x),
        address(grad_weight),
        address(grad_bias) if biased else 0,
        address(partial),
        partial_rows,
        rows,
        columns,
        weight_offset,
        DTYPE_CODES[stream.dtype],
        DTYPE_CODES[weight.dtype],
        device,
        cuda_stream,
    )
    return grad_x, grad_weight, grad_bias


def _add_norm_cpu(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    weight_offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = (x + delta).contiguous()
    return stream, *_norm_cpu(stream, weight, bias, epsilon, weight_offset, centred)


def _norm_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, weight_offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float().contiguous()
    mean = wide.mean(-1) if centred else wide.new_empty(0)
    wide = wide - mean.unsqueeze(-1) if centred else wide
    inverse = (wide.square().mean(-1) + epsilon).rsqrt()
    normed = wide * inverse.unsqueeze(-1) * (weight.float() + weight_offset)
    return (normed if bias is None else normed + bias.float()).to(weight.dtype), mean, inverse


def _norm_backward_cpu(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight_offset: float,
    centred: bool,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, grad = stream.float().contiguous(), grad_normed.float().contiguous()
    normalised = (wide - mean.unsqueeze(-1) if centred else wide) * inverse.unsqueeze(-1)
    scaled = grad * (weight.float() + weight_offset)
    grad_x = scaled - normalised * (scaled * normalised).mean(-1, keepdim=True)
    if centred:
        grad_x = grad_x - scaled.mean(-1, keepdim=True)
    grad_x = grad_x * inverse.unsqueeze(-1)
    if grad_stream is not None:
        grad_x = grad_x + grad_stream
    grad_weight = (grad * normalised).flatten(0, -2).sum(0).to(weight.dtype)
    grad_bias = grad.flatten(0, -2).sum(0).to(weight.dtype) if biased else weight.new_empty(0)
    return grad_x.to(stream.dtype), grad_weight, grad_bias


def _norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, weight_offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=weight.dtype), *_statistics(x, centred)


def _add_norm_fake(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    weight_offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_norm_fake(x, weight, bias, epsilon, weight_offset, centred)


def _norm_backward_fake(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight_offset: float,
    centred: bool,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = weight.new_empty(weight.shape)
    return stream.new_empty(stream.shape), grad_weight, torch.empty_like(grad_weight) if biased else weight.new_empty(0)


_norm = Operator(
    "norm(Tensor x, Tensor weight, Tensor? bias, float epsilon, float weight_offset, bool centred)"
    " -> (Tensor, Tensor, Tensor)",
    cuda=_norm_cuda,
    cpu=_norm_cpu,
    fake=_norm_fake,
)
_add_norm = Operator(
    "add_norm(Tensor x, Tensor delta, Tensor weight, Tensor? bias, float epsilon, float weight_offset, bool centred)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_add_norm_cuda,
    cpu=_add_norm_cpu,
    fake=_add_norm_fake,
)
_norm_backward = Operator(
    "norm_backward(Tensor grad_normed, Tensor? grad_stream, Tensor stream, Tensor weight, Tensor mean, Tensor inverse,"
    " float weight_offset, bool centred, bool biased) -> (Tensor, Tensor, Tensor)",
    cuda=_norm_backward_cuda,
    cpu=_norm_backward_cpu,
    fake=_norm_backward_fake,
)


def _keep(ctx: Any, stream: Tensor, weight: Tensor, bias: Tensor | None, statistics: Any, numbers: Any) -> None:
    ctx.save_for_backward(stream, weight, *statistics)
    _, ctx.weight_offset, ctx.centred = numbers
    ctx.biased = bias is not None


def _gradients(
    ctx: Any, grad_normed: Tensor, grad_stream: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stream, weight, mean, inverse = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _norm_backward(
        grad_normed, grad_stream, stream, weight, mean, inverse, ctx.weight_offset, ctx.centred, ctx.biased
    )
    return grad_x, grad_weight, grad_bias if ctx.biased else None


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *numbers = inputs
    _keep(ctx, x, weight, bias, output[1:], numbers)


def _norm_gradients(ctx: Any, grad_normed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_normed is None:
        return (None,) * 6
    return *_gradients(ctx, grad_normed, None), None, None, None


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, delta, weight, bias, *numbers = inputs
    ctx.delta_dtype = delta.dtype
    _keep(ctx, output[0], weight, bias, output[2:], numbers)


def _add_norm_gradients(
    ctx: Any, grad_stream: Tensor | None, grad_normed: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = grad_stream, None, None
    if grad_normed is not None:
        grad_x, grad_weight, grad_bias = _gradients(ctx, grad_normed, grad_stream)
    grad_delta = None if grad_x is None else grad_x.to(ctx.delta_dtype)
    return grad_x, grad_delta, grad_weight, grad_bias, None, None, None


_norm.define_gradient(_norm_gradients, _keep_norm)
_add_norm.define_gradient(_add_norm_gradients, _keep_add_norm)


class _StreamNorm(torch.autograd.Function):
    """The norm with its input as a result, which an operator may not return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *numbers: Any) -> tuple[Tensor, Tensor]:
        normed, *statistics = _norm_cuda(x, weight, bias, *numbers)
        ctx.set_materialize_grads(False)
        _keep(ctx, x, weight, bias, statistics, numbers)
        return x, normed

    @staticmethod
    def backward(ctx: Any, grad_stream: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_normed is None:
            return grad_stream, None, None, None, None, None
        return *_gradients(ctx, grad_normed, grad_stream), None, None, None
