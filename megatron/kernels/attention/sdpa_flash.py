"""Attention by torch's FlashAttention-2 kernel and no other.

Choose it to be sure of that kernel: to compare, or because its gradients are the same bits every time once torch is
asked to be deterministic.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention import SDPBackend

from megatron.kernels.attention.interface import HALF_DTYPES, AttentionBackend, prefer
from megatron.kernels.attention.sdpa import attend_squarely

OLDEST_CAPABILITY = (8, 0)


def unavailable() -> str | None:
    """Say why not on this machine."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention kernel"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


BACKEND = AttentionBackend(
    name="sdpa_flash",
    choose_when="torch's FlashAttention-2 kernel",
    preference=prefer(30),
    attend=partial(attend_squarely, SDPBackend.FLASH_ATTENTION),
    in_products="fused without dropout",
    unavailable=unavailable,
    features=frozenset({"dropout", "gqa", "bidirectional"}),
    dtypes=HALF_DTYPES,
    device_types=frozenset({"cuda"}),
    max_head_size=256,
    head_size_multiple=8,
)
