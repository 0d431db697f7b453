"""The kernels of flash-attn-4 as operators of torch, which the package's own functions are not.

So recompute knows what a result is worth and can keep it, and `torch.compile` keeps its graph whole.

The functions below the package's own operator have no public name, and a newer package may change them:
`why_interface_differs` looks before the first call, so that a run stops at its start and says what to install.

Legend: s sequence, b batch, n query heads, k key/value heads, d head size.
"""

from __future__ import annotations

import functools
import inspect
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron.kernels.attention.mask import pairs_seen

WRITTEN_FOR = "4.0.0b36"
"""The version whose functions are called here."""
_SHARED = (
    *("q", "k", "v", "out", "lse", "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
)
CALLED = {
    "_flash_attn_fwd": (*_SHARED, "return_lse"),
    "_flash_attn_bwd": (*_SHARED, "dout", "dq", "dk", "dv", "deterministic"),
}
"""Functions of the package's `interface`, and the names of what they are given."""


@functools.cache
def why_interface_differs() -> str | None:
    """Say that the package does not load here, or that a function does not take what it is given; None when all do.

    Loads the package, which takes seconds. It is beta and so are those that it builds on: anything may go wrong.
    """
    try:
        from flash_attn.cute import interface

        for name, arguments in CALLED.items():
            inspect.signature(getattr(interface, name)).bind(**dict.fromkeys(arguments))
    except Exception as error:
        what = (str(error).splitlines() or [""])[0]
        return (
            f"flash-attn-4 {version('flash-attn-4')} differs from {WRITTEN_FOR} or does not load "
            f"({type(error).__name__}: {what}): pip install 'flash-attn-4[cu13]=={WRITTEN_FOR}'"
        )
    return None


@torch.library.custom_op("megatron::flash_v4_forward", mutates_args=())
def flash_v4_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    samples: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Compute attention.

    Args:
        query: [b, s, n, d], or [b x s, n, d] with offsets; likewise key and value, with k heads.
        key: see there.
        value: see there.
        offsets: int32 [documents + 1], where each begins among all tokens; None: samples are whole.
        samples: b.
        scale: factor on the logits.
        causal: whether a query sees only the keys up to its own.
        window: how many keys a query sees, its own and those before; 0: all.
        softcap: bound of the logits; 0: none.
        deterministic: whether backward gives the same bits every time.

    Returns:
        The output, as the query, but in memory [s, b, n, d] without offsets, as the product that follows reads it; and
        the logarithms of the softmax denominators, fp32 [b, n, s] or [n, b x s].
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    before, after = _sides(window)
    output, log_sums = _make_results(query)
    _flash_attn_fwd(
        q=query,
        k=key,
        v=value,
        out=output,
        lse=log_sums,
        softmax_scale=scale,
        causal=causal,
        softcap=softcap,
        window_size_left=before,
        window_size_right=after,
        return_lse=True,
        **({} if offsets is None else _packed(offsets, query, samples)),
    )
    return output, log_sums


@torch.library.custom_op("megatron::flash_v4_backward", mutates_args=())
def flash_v4_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    offsets: Tensor | None,
    samples: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value: `grad` is that of the output; for the rest see the forward."""
    from flash_attn.cute.interface import _flash_attn_bwd

    before, after = _sides(window)
    dq, dk, dv = _flash_attn_bwd(
        q=query,
        k=key,
        v=value,
        out=output,
        dout=grad,
        lse=log_sums,
        softmax_scale=scale,
        causal=causal,
        softcap=softcap,
        window_size_left=before,
        window_size_right=after,
        deterministic=deterministic,
        dq=_like(query),
        dk=_like(key),
        dv=_like(value),
        **({} if offsets is None else _packed(offsets, query, samples)),
    )
    return dq, dk, dv


def _sides(window: int) -> tuple[int | None, int | None]:
    """Say how many keys before and after its own a query sees; None: all."""
    return (window - 1, 0) if window else (None, None)


def _packed(offsets: Tensor, tokens: Tensor, samples: int) -> dict[str, Any]:
    """Tell of documents; the package wants a bound of their lengths. That of a sample makes no new kernel or graph."""
    longest = len(tokens) // samples
    return {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _make_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Make room for what forward computes."""
    *tokens, heads, size = query.shape
    if len(tokens) == 1:
        output = query.new_empty(query.shape)
    else:
        output = query.new_empty(*reversed(tokens), heads, size).transpose(0, 1)
    rows = (heads, tokens[0]) if len(tokens) == 1 else (tokens[0], heads, tokens[1])
    return output, query.new_empty(rows, dtype=torch.float32)


def _like(tensor: Tensor) -> Tensor:
    """Make room for a gradient, laid out as what it is of if the channels of that are neighbours in memory."""
    return torch.empty_like(tensor if tensor.stride(-1) == 1 else tensor.contiguous())


@flash_v4_forward.register_fake
def _fake_forward(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _make_results(query)


@flash_v4_backward.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, *options = inputs
    ctx.save_for_backward(query, key, value, *output, offsets)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*flash_v4_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7)


flash_v4_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.megatron.flash_v4_forward)
def _count_forward(query: Any, key: Any, value: Any, *arguments: Any, out_shape: Any = None) -> int:
    """Count two products over what is seen, given shapes: by this, recompute knows what the result is worth."""
    _offsets, samples, _scale, causal, window, *_ = arguments
    *tokens, heads, size = query
    length = tokens[-1] // (samples if len(tokens) == 1 else 1)
    return 4 * pairs_seen(length, length, causal, window) * samples * heads * size


@register_flop_formula(torch.ops.megatron.flash_v4_backward)
def _count_backward(
    grad: Any, query: Any, key: Any, value: Any, output: Any, log_sums: Any, *arguments: Any, **_: Any
) -> int:
    """Count five products over what is seen."""
    return _count_forward(query, key, value, *arguments) * 5 // 2
