"""FlashAttention-4 by the package flash-attn-4: Python that CUTLASS compiles for the GPU when it first runs.

Choose it on Hopper and Blackwell from 2k tokens on and for heads of 64, where nothing else is as fast.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from megatron.kernels.attention.documents import PackedDocuments, pack_documents
from megatron.kernels.attention.flash_v4_operator import flash_v4_forward, why_interface_differs
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
"""Head sizes that were compared with fp64 on Hopper. Those of 80 come out wrong, and nothing says so: by its source the
kernel of backward pads heads to a multiple of 16 there, and its caller lays out the sums for it by multiples of 32."""


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
    if mask is not None or dropout:
        raise ValueError("flash_v4 takes no mask and drops no weights: choose flash_triton or flash_v2")
    options = (query_sbnd.shape[1], scale, causal, window, softcap, same_bits_wanted())
    if documents is not None:
        packed = partial(_attend_packed, options)
        return attend_packed(packed, query_sbnd, key_sbkd, value_sbkd, documents)
    heads = (tensor.transpose(0, 1) for tensor in (query_sbnd, key_sbkd, value_sbkd))
    output, _ = flash_v4_forward(*heads, None, *options)
    return output.transpose(0, 1)


def _attend_packed(options: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor, *documents: Any) -> Tensor:
    """Take queries and keys of the same documents."""
    output, _ = flash_v4_forward(query, key, value, documents[0], *options)
    return output


def _prepare_documents(ids_bs: Tensor) -> PackedDocuments:
    """Pack documents, and have one graph of `torch.compile` serve however many there are."""
    from torch._dynamo import maybe_mark_dynamic  # takes a second, which runs without documents need not spend

    documents = pack_documents(ids_bs)
    maybe_mark_dynamic(documents.offsets, 0)
    return documents


def unavailable() -> str | None:
    """Say why not on this machine. The wheel of flash-attn 2.8 holds an older state of this package, in its folder."""
    return (
        why_not_installed("flash-attn-4", OLDEST, "flash-attn-4")
        or why_overwritten("flash-attn-4", "flash_attn/cute/interface.py")
        or why_not_on_gpu((9, 0))
        or why_interface_differs()
    )


def _preference(request: AttentionRequest) -> int:
    is_short = request.sequence_length is None or request.sequence_length < LONG
    return 50 if is_short and request.head_size > 64 else 70


BACKEND = AttentionBackend(
    name="flash_v4",
    choose_when="flash-attn-4, on Hopper the fastest from 2k tokens on, for heads of 64 and for documents",
    preference=_preference,
    attend=attend,
    in_products="fused",  # it drops nothing
    unavailable=unavailable,
    features=frozenset({"gqa", "documents", "window", "softcap", "bidirectional"}),
    dtypes=HALF_DTYPES,
    device_types=frozenset({"cuda"}),
    head_sizes=PROVEN,
    dense_document_mask=False,
    prepare_documents=_prepare_documents,
)
