"""Attention by torch's own fused kernels.

Choose it wherever there is no reason for another: no s x s weights in memory, nothing to install. On Hopper and later
GPUs cuDNN's kernel comes first, elsewhere FlashAttention-2; both need half precision, and fp32 gets the
memory-efficient kernel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.kernels.attention.interface import AttentionBackend
from megatron.kernels.attention.mask import combine_masks
from megatron.kernels.constant import cached_constant

HOPPER = 9  # major compute capability from which cuDNN's kernel is the fastest
CUDNN_MAX_HEAD_SIZE = 128  # beyond it cuDNN has no backward on every GPU


def attend(
    query_sbnd: Tensor,
    key_sbkd: Tensor,
    value_sbkd: Tensor,
    *,
    scale: float,
    causal: bool,
    dropout: float,
    mask: Tensor | None = None,
) -> Tensor:
    """See `Attend`."""
    # torch's own causal mask is aligned to the top left and excludes any other: it serves the square case alone.
    square = query_sbnd.shape[0] == key_sbkd.shape[0]
    is_causal = causal and square and mask is None
    if not is_causal:
        mask = combine_masks(query_sbnd, key_sbkd, causal=causal, mask=mask)
    # cuDNN plans anew for every pair of lengths, which generation would pay for with each token.
    cudnn = square and _is_hopper(query_sbnd.device) and query_sbnd.shape[-1] <= CUDNN_MAX_HEAD_SIZE
    group_size = query_sbnd.shape[2] // key_sbkd.shape[2]
    if group_size > 1 and not _takes_groups(query_sbnd, masked=mask is not None, cudnn=cudnn):
        key_sbkd, value_sbkd = (tensor.repeat_interleave(group_size, dim=2) for tensor in (key_sbkd, value_sbkd))
        group_size = 1
    with _kernel_order(query_sbnd.device, cudnn=cudnn):
        context_bnsd = F.scaled_dot_product_attention(
            query_sbnd.permute(1, 2, 0, 3),
            key_sbkd.permute(1, 2, 0, 3),
            value_sbkd.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=group_size > 1,
        )
    return context_bnsd.permute(2, 0, 1, 3)


def _kernel_order(device: torch.device, *, cudnn: bool) -> AbstractContextManager[object]:
    """Set the order in which torch tries its kernels; the CPU has only one."""
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *order] if cudnn else order, set_priority=True)


def _takes_groups(query: Tensor, *, masked: bool, cudnn: bool) -> bool:
    """Say whether the kernel that torch will take reads fewer key heads than query heads.

    The memory-efficient one does not, and on CUDA fp32 is left to it, and so are masks where cuDNN is not used.
    """
    if query.device.type != "cuda":
        return True
    return query.dtype != torch.float32 and (not masked or cudnn)


@cached_constant(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    """Say whether the device is one of those where cuDNN's kernel is the fastest."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= HOPPER


BACKEND = AttentionBackend(
    name="sdpa",
    choose_when="torch's fused kernels, no s x s weights in memory",
    preference=10,
    attend=attend,
)
