"""FlashAttention-4 by the package flash-attn-4: Python that CUTLASS compiles for the GPU when it first runs.

Choose it on Hopper and Blackwell from 2k tokens on and for heads of 64, where nothing else is as fast.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from megatron.kernels.attention.documents import PackedDocuments, pack_documents
from megatron.kernels.attention.interface import HALF_DTYPES, AttentionBackend, AttentionRequest
from megatron.kernels.attention.packages import (
    attend_packed,
    same_bits_wanted,
    why_not_installed,
    why_not_on_gpu,
    why_overwritten,
)

OLDEST = (4, 0)
LONG = 2048
"""Tokens from which it was measured to be the fastest for heads of 128; of fewer nothing is known."""
PROVEN = (64, 96, 128)
"""Head sizes whose gradients were compared with fp64 on Hopper. Of 80 they are wrong, and nothing says so: there the
kernel of backward pads heads to a multiple of 16, and its caller lays out the sums it adds to by multiples of 32."""


def attend(
    query_sbnd: Tensor,
    key_sbkd: Tensor,
    value_sbkd: Tensor,
    *,
    scale: float,
    causal: bool,
    dropout: float,
    mask: Tensor | None = None,
    documents: PackedDocuments | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """See `Attend`.

    Raises:
        ValueError: the package cannot compute this.
    """
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if mask is not None or dropout:
        raise ValueError("flash_v4 takes no mask and drops no weights: choose flash_triton or flash_v2")
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (window - 1, 0) if window else (None, None),  # keys before and after the query's own
        "softcap": softcap,
        "deterministic": same_bits_wanted(),
    }
    if documents is not None:
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        packed = partial(_call, flash_attn_varlen_func, names, options)
        return attend_packed(packed, query_sbnd, key_sbkd, value_sbkd, documents)
    heads = (tensor.transpose(0, 1) for tensor in (query_sbnd, key_sbkd, value_sbkd))
    return _call(flash_attn_func, ("q", "k", "v"), options, *heads).transpose(0, 1)


def _call(function: Any, names: tuple[str, ...], options: dict[str, Any], *values: Any) -> Tensor:
    """Call by name, and leave out the log-sums that may come with the output."""
    result = function(**dict(zip(names, values, strict=True)), **options)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def unavailable() -> str | None:
    """Say why not on this machine. The wheel of flash-attn 2.8 holds an older state of this package, in its folder."""
    return (
        why_not_installed("flash-attn-4", OLDEST, "flash-attn-4")
        or why_overwritten("flash-attn-4", "flash_attn/cute/interface.py")
        or why_not_on_gpu((9, 0))
    )


def _preference(request: AttentionRequest) -> int:
    is_short = request.sequence_length is None or request.sequence_length < LONG
    return 50 if is_short and request.head_size > 64 else 70


BACKEND = AttentionBackend(
    name="flash_v4",
    choose_when="flash-attn-4, on Hopper the fastest from 2k tokens on, for heads of 64 and for documents",
    preference=_preference,
    attend=attend,
    unavailable=unavailable,
    features=frozenset({"gqa", "documents", "window", "softcap", "bidirectional"}),
    dtypes=HALF_DTYPES,
    device_types=frozenset({"cuda"}),
    head_sizes=PROVEN,
    dense_document_mask=False,
    prepare_documents=pack_documents,
)
