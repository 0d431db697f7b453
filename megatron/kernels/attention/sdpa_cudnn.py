"""Attention by cuDNN's kernel and no other.

Choose it on Hopper and later GPUs, where it is the fastest of those that come with torch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention import SDPBackend

from megatron.kernels.attention.interface import HALF_DTYPES, AttentionBackend, AttentionRequest
from megatron.kernels.attention.sdpa import CUDNN_MAX_HEAD_SIZE, HOPPER, attend_squarely

OLDEST_CAPABILITY = (8, 0)


def unavailable() -> str | None:
    """Say why not on this machine."""
    if not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def _preference(request: AttentionRequest) -> int:
    del request
    return 60 if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= HOPPER else 5


BACKEND = AttentionBackend(
    name="sdpa_cudnn",
    choose_when="cuDNN's kernel, the fastest of torch's on Hopper",
    preference=_preference,
    attend=partial(attend_squarely, SDPBackend.CUDNN_ATTENTION),
    in_products="fused without dropout",
    unavailable=unavailable,
    features=frozenset({"dropout", "gqa", "bidirectional"}),
    dtypes=HALF_DTYPES,
    device_types=frozenset({"cuda"}),
    max_head_size=CUDNN_MAX_HEAD_SIZE,
    head_size_multiple=8,
)
