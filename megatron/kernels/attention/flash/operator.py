"""The kernels as operators of torch: `torch.compile` sees through to their shapes, autograd to their gradients.

Legend: s queries, s' keys, b batch, n query heads, k key/value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron.kernels.attention.flash.launch import Options, addressable, launch_backward, launch_forward
from megatron.kernels.attention.mask import pairs_seen


@torch.library.custom_op("megatron::flash_forward", mutates_args=())
def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    seeds: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Compute attention.

    Args:
        query: [s, b, n, d], its channels neighbours in memory; likewise key and value, [s', b, k, d].
        key: see there.
        value: see there.
        bounds: int32 [b, 2, s], where the document of each token begins and ends; None: there is one.
        seeds: int64 [1] of dropout; None without.
        scale: see `Options`, and so for the rest.
        causal: see there.
        window: see there.
        softcap: see there.
        dropout: see there.

    Returns:
        The output, [s, b, n, d], and the base-2 logarithms of the softmax denominators, fp32 [b, n, s].
    """
    options = Options(scale=scale, causal=causal, window=window, softcap=softcap, dropout=dropout)
    return launch_forward(addressable(query), addressable(key), addressable(value), bounds, seeds, options)


@torch.library.custom_op("megatron::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    bounds: Tensor | None,
    seeds: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value: `grad` is that of the output; for the rest see `flash_forward`."""
    options = Options(scale=scale, causal=causal, window=window, softcap=softcap, dropout=dropout)
    grad, query, key, value = (addressable(tensor) for tensor in (grad, query, key, value))
    return launch_backward(grad, query, key, value, output, log_sums, bounds, seeds, options)


@flash_forward.register_fake
def _fake_forward(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    length, batch, heads, _size = query.shape
    log_sums = query.new_empty((batch, heads, length), dtype=torch.float32)
    return query.new_empty(query.shape), log_sums


@flash_backward.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, seeds, *options = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, seeds)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *rest = ctx.saved_tensors
    return (*flash_backward(grad, query, key, value, *rest, *ctx.options), *(None,) * 7)


flash_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.megatron.flash_forward)
def _count_forward(query: Any, key: Any, *arguments: Any, out_shape: Any = None) -> int:
    """Count two products over what is seen, given shapes: by this, recompute knows what the result is worth."""
    length, batch, heads, size = query
    _value, _bounds, _seeds, _scale, causal, window, *_ = arguments
    return 4 * pairs_seen(length, key[0], causal, window) * batch * heads * size


@register_flop_formula(torch.ops.megatron.flash_backward)
def _count_backward(
    grad: Any, query: Any, key: Any, value: Any, output: Any, log_sums: Any, *arguments: Any, **_: Any
) -> int:
    """Count five products over what is seen; that the kernels make two of them twice is their own affair."""
    return _count_forward(query, key, value, *arguments) * 5 // 2
