"""FlashAttention by the interface of flash-attn 1.x (Dao et al. 2022, arXiv:2205.14135).

Choose it to run the kernel of older experiments. Everything goes through the function for packed documents, which 2.x
has under a newer name: with that version installed, its kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from megatron.kernels.attention.documents import PackedDocuments, pack_documents
from megatron.kernels.attention.interface import HALF_DTYPES, AttentionBackend, prefer
from megatron.kernels.attention.packages import (
    attend_packed,
    installed_version,
    same_bits_wanted,
    whole_samples,
    why_not_installed,
    why_not_on_gpu,
)

OLDEST = (1, 0)


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
    """See `Attend`. Key heads are repeated: 1.x has none that are shared.

    Raises:
        ValueError: the package cannot compute this.
    """
    if mask is not None or window or softcap:
        raise ValueError("flash_v1 takes no mask, no window and no cap: choose flash_v2 or flash_triton")
    length, batch, heads, _ = query_sbnd.shape
    if key_sbkd.shape[0] != length:
        raise ValueError("flash_v1 aligns causal masks to the first key: it needs as many queries as keys")
    if key_sbkd.shape[2] != heads:
        copies = heads // key_sbkd.shape[2]
        key_sbkd, value_sbkd = (tensor.repeat_interleave(copies, dim=2) for tensor in (key_sbkd, value_sbkd))
    if documents is None:
        documents = PackedDocuments(whole_samples(batch, length, query_sbnd.device), length)
    options: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scale, "causal": causal}
    if same_bits_wanted():
        options["deterministic"] = True  # only then: 2.0 to 2.4 do not know the word
    packed = partial(find_function(), **options)
    return attend_packed(packed, query_sbnd, key_sbkd, value_sbkd, documents)


def find_function() -> Callable[..., Any]:
    """Import the function for packed documents of the version that is installed."""
    from flash_attn import flash_attn_interface

    function: Callable[..., Any] | None = getattr(flash_attn_interface, "flash_attn_unpadded_func", None)
    return function or flash_attn_interface.flash_attn_varlen_func


def unavailable() -> str | None:
    """Say why not on this machine."""
    is_second = (installed_version("flash-attn") or OLDEST) >= (2, 0)
    return why_not_installed("flash-attn", OLDEST, "flash-attn") or why_not_on_gpu((8, 0) if is_second else (7, 5))


BACKEND = AttentionBackend(
    name="flash_v1",
    choose_when="the interface of flash-attn 1.x",
    preference=prefer(2),
    attend=attend,
    unavailable=unavailable,
    features=frozenset({"dropout", "gqa", "documents", "bidirectional"}),
    dtypes=HALF_DTYPES,
    device_types=frozenset({"cuda"}),
    max_head_size=128,
    head_size_multiple=8,
    dense_document_mask=False,
    prepare_documents=pack_documents,
)
