"""FlashAttention-2 by this project's own Triton kernels.

Choose it where no other fused kernel keeps documents apart, slides a window or caps logits, and where backward must
give the same bits every time: it adds nothing atomically. It needs no package but Triton, which torch brings on Linux.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from megatron.kernels.attention.interface import ALL_FEATURES, HALF_DTYPES, AttentionBackend, AttentionRequest
from megatron.kernels.attention.sdpa import CUDNN_MAX_HEAD_SIZE, HOPPER

OLDEST_CAPABILITY = (8, 0)


def attend(
    query_sbnd: Tensor,
    key_sbkd: Tensor,
    value_sbkd: Tensor,
    *,
    scale: float,
    causal: bool,
    dropout: float,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """See `Attend`. The documents are bounds, int32 [b, 2, s].

    The seed of dropout is drawn from torch's generator of the device, so that recompute repeats it.

    Raises:
        ValueError: the kernels cannot compute this.
    """
    from megatron.kernels.attention.flash.operator import flash_forward

    if mask is not None:
        raise ValueError("flash_triton takes no mask: give documents")
    if window and not causal:
        raise ValueError("a window looks back from each query: it needs causal attention")
    if scale <= 0:
        raise ValueError(f"flash_triton scales logits by a positive number, not {scale}")
    length, batch = query_sbnd.shape[:2]
    if documents is not None and (key_sbkd.shape[0] != length or documents.shape != (batch, 2, length)):
        raise ValueError(
            f"documents of {batch} x {length} queries need as many keys, and their bounds are [{batch}, 2, {length}], "
            f"not {list(documents.shape)}"
        )
    seeds = torch.randint(2**62, (1,), device=query_sbnd.device) if dropout else None
    output, _ = flash_forward(
        query_sbnd, key_sbkd, value_sbkd, documents, seeds, scale, causal, window, softcap, dropout
    )
    return output


def unavailable() -> str | None:
    """Say why not on this machine."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def _preference(request: AttentionRequest) -> int:
    """On Hopper, where its tiles were measured, stand above FlashAttention-2, in torch's hands or the package's."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != HOPPER:
        return 35
    return 45 if request.head_size > CUDNN_MAX_HEAD_SIZE else 39


BACKEND = AttentionBackend(
    name="flash_triton",
    choose_when="this project's Triton kernels, whose gradients are the same bits every time",
    preference=_preference,
    attend=attend,
    in_products="fused",  # the seed of dropout is drawn outside of it
    unavailable=unavailable,
    features=ALL_FEATURES - {"mask"},
    dtypes=HALF_DTYPES,
    device_types=frozenset({"cuda"}),
    max_head_size=256,
    head_size_multiple=8,
    dense_document_mask=False,
)
