"""Softmax of attention scores, scaled, masked, causal or both: in plain torch, and fused.

Legend: b batch, n heads, s queries, s' keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention.mask import causal_mask
from megatron.kernels.build import load_kernel
from megatron.kernels.operator import (
    DTYPE_CODES,
    Operator,
    address,
    falls_back,
    place,
    why_not_computed,
)


def scaled_softmax(scores: Tensor, *, scale: float = 1.0, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(scale x scores) over the keys that each query may attend to; zeros where there are none.

    The arithmetic is fp32 for scores of a smaller type.

    Args:
        scores: [b, n, s, s'].
        scale: factor on the scores.
        causal: whether query i sees only the keys 0 .. s' - s + i (aligned to the bottom right).
        mask: bool [b or 1, 1, s or 1, s'], True = may attend. With `causal`, both hold.

    Returns:
        [b, n, s, s'] in the dtype of the scores.
    """
    allowed = mask
    if causal:
        seen = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        allowed = seen if mask is None else seen & mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    scaled = scores if scale == 1.0 else scores.to(wide) * scale
    if allowed is None:
        return scaled.softmax(dim=-1, dtype=wide).to(scores.dtype)
    weights = scaled.masked_fill(~allowed, float("-inf")).softmax(dim=-1, dtype=wide)
    if mask is not None or scores.shape[-2] > scores.shape[-1]:
        # There may be queries without a key, whose softmax is NaN; their gradient stops at the first fill.
        weights = weights.masked_fill(~allowed, 0.0)
    return weights.to(scores.dtype)


def fused_scaled_softmax(
    scores: Tensor, *, scale: float = 1.0, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Compute `scaled_softmax` in one pass; backward, in one more, needs the weights alone.

    Keys that causality hides are not read. There are no limits on lengths, batch or heads.
    """
    if falls_back("softmax", why_not_computed(scores.dtype)):
        return scaled_softmax(scores, scale=scale, causal=causal, mask=mask)
    weights: Tensor = _softmax(scores, mask, scale, causal)
    return weights


def _softmax_cuda(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = scores.contiguous()
    batch, heads, queries, keys = scores.shape
    weights, mask_batch, mask_query = torch.empty_like(scores), 0, 0
    if mask is not None:
        mask = mask.expand(batch, 1, queries, keys)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        mask_batch, _, mask_query, _ = mask.stride()
    load_kernel("softmax").forward(
        address(scores),
        address(mask),
        mask_batch,
        mask_query,
        address(weights),
        batch * heads * queries,
        heads,
        queries,
        keys,
        causal,
        scale,
        DTYPE_CODES[scores.dtype],
        *place(scores),
    )
    return weights


def _backward_cuda(grad: Tensor, weights: Tensor, scale: float, causal: bool) -> Tensor:
    grad, weights = grad.contiguous(), weights.contiguous()
    queries, keys = weights.shape[-2:]
    grad_scores = torch.empty_like(weights)
    load_kernel("softmax").backward(
        address(weights),
        address(grad),
        address(grad_scores),
        weights.numel() // keys if keys else 0,
        queries,
        keys,
        causal,
        scale,
        DTYPE_CODES[weights.dtype],
        *place(weights),
    )
    return grad_scores


def _softmax_cpu(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return scaled_softmax(scores, scale=scale, causal=causal, mask=mask).contiguous()


def _backward_cpu(grad: Tensor, weights: Tensor, scale: float, causal: bool) -> Tensor:
    wide, grad = weights.float(), grad.float()
    # Of a weight near 1 the plain formula would leave the rounding: see `Centred` in the kernel.
    is_most = wide > 0.5
    others = wide.masked_fill(is_most, 0.0)
    centred = grad - grad.masked_fill(~is_most, 0.0).sum(dim=-1, keepdim=True)
    wide = torch.where(is_most, 1.0 - others.sum(dim=-1, keepdim=True), wide)
    grad_scores = scale * wide * (centred - (others * centred).sum(dim=-1, keepdim=True))
    return grad_scores.to(weights.dtype).contiguous()


def _softmax_fake(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return scores.new_empty(scores.shape)


def _backward_fake(grad: Tensor, weights: Tensor, scale: float, causal: bool) -> Tensor:
    return weights.new_empty(weights.shape)


_softmax = Operator(
    "scaled_softmax(Tensor scores, Tensor? mask, float scale, bool causal) -> Tensor",
    cuda=_softmax_cuda,
    cpu=_softmax_cpu,
    fake=_softmax_fake,
)
_backward = Operator(
    "scaled_softmax_backward(Tensor grad, Tensor weights, float scale, bool causal) -> Tensor",
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    (weights,) = ctx.saved_tensors
    return None if grad is None else _backward(grad, weights, ctx.scale, ctx.causal), None, None, None


_softmax.define_gradient(_gradients, _keep)
