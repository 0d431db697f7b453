"""FlashAttention-2 by the package flash-attn 2.x (Dao 2023, arXiv:2307.08691).

Choose it where the package is installed and documents, a window or dropout are wanted at the speed of CUDA kernels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron.kernels.attention.documents import PackedDocuments, pack_documents
from megatron.kernels.attention.interface import (
    ALL_FEATURES,
    HALF_DTYPES,
    AttentionBackend,
    AttentionRequest,
    prefer,
)
from megatron.kernels.attention.packages import attend_packed, same_bits_wanted, why_not_installed, why_not_on_gpu

OLDEST = (2, 6)  # the first with capped logits
LITTLE_SHARED_MEMORY = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})
"""Where the package launches nothing at all in backward for heads wider than 192 under dropout, and says nothing."""


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
    """See `Attend`. Its causal mask is aligned to the bottom right.

    Raises:
        ValueError: the package cannot compute this.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if mask is not None:
        raise ValueError("flash_v2 takes no mask: give documents")
    if softcap and dropout:
        raise ValueError("flash_v2 does not drop weights of capped logits")
    options = {
        "dropout_p": dropout,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (window - 1, 0) if window else (-1, -1),  # keys before and after the query's own
        "softcap": softcap,
        "deterministic": same_bits_wanted(),
    }
    if documents is not None:
        packed = partial(flash_attn_varlen_func, **options)
        return attend_packed(packed, query_sbnd, key_sbkd, value_sbkd, documents)
    heads = (tensor.transpose(0, 1) for tensor in (query_sbnd, key_sbkd, value_sbkd))
    output: Tensor = flash_attn_func(*heads, **options)
    return output.transpose(0, 1)


def unavailable() -> str | None:
    """Say why not on this machine."""
    return why_not_installed("flash-attn", OLDEST, "flash-attn") or why_not_on_gpu((8, 0))


def _limits(request: AttentionRequest) -> str | None:
    if request.dropout and request.head_size > 192 and torch.cuda.get_device_capability() in LITTLE_SHARED_MEMORY:
        return f"on this GPU it drops no weights in backward of heads wider than 192, not {request.head_size}"
    return None


BACKEND = AttentionBackend(
    name="flash_v2",
    choose_when="the kernels of flash-attn 2.x",
    preference=prefer(38),
    attend=attend,
    unavailable=unavailable,
    limits=_limits,
    features=ALL_FEATURES - {"mask"},
    excludes=(frozenset({"softcap", "dropout"}),),
    dtypes=HALF_DTYPES,
    device_types=frozenset({"cuda"}),
    max_head_size=256,
    head_size_multiple=8,
    dense_document_mask=False,
    prepare_documents=pack_documents,
)
