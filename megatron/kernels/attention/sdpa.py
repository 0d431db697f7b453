"""Attention by torch's own fused kernels, in torch's hands.

Choose it wherever there is no reason for another: no s x s weights in memory, nothing to install. On Hopper and later
GPUs cuDNN's kernel comes first, elsewhere FlashAttention-2; both need half precision, and fp32 gets the
memory-efficient kernel. `sdpa_cudnn` and `sdpa_flash` insist on theirs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.kernels.attention.interface import ALL_FEATURES, AttentionBackend, AttentionRequest
from megatron.kernels.attention.mask import and_documents, combine_masks
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
    documents: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """See `Attend`. Documents, as bounds, and a window become a mask.

    Raises:
        ValueError: logits are to be capped.
    """
    if softcap:
        raise ValueError("torch's kernels do not cap logits: choose unfused or flash_triton")
    # torch's own causal mask is aligned to the top left and excludes any other: it serves the square case alone.
    square = query_sbnd.shape[0] == key_sbkd.shape[0]
    mask = and_documents(mask, documents)
    is_causal = causal and square and mask is None and not 0 < window < key_sbkd.shape[0]
    if not is_causal:
        mask = combine_masks(query_sbnd, key_sbkd, causal=causal, mask=mask, window=window)
    # cuDNN plans anew for every pair of lengths, which generation would pay for with each token.
    cudnn = square and _is_hopper(query_sbnd.device) and query_sbnd.shape[-1] <= CUDNN_MAX_HEAD_SIZE
    group_size = query_sbnd.shape[2] // key_sbkd.shape[2]
    if group_size > 1 and not _takes_groups(query_sbnd, masked=mask is not None, cudnn=cudnn):
        key_sbkd, value_sbkd = (tensor.repeat_interleave(group_size, dim=2) for tensor in (key_sbkd, value_sbkd))
    with _kernel_order(query_sbnd.device, cudnn=cudnn):
        return call_torch(
            query_sbnd, key_sbkd, value_sbkd, scale=scale, is_causal=is_causal, dropout=dropout, mask=mask
        )


def call_torch(
    query_sbnd: Tensor,
    key_sbkd: Tensor,
    value_sbkd: Tensor,
    *,
    scale: float,
    is_causal: bool,
    dropout: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Call torch's operator in its layout, without copies; `is_causal` is aligned to the top left."""
    context_bnsd = F.scaled_dot_product_attention(
        query_sbnd.permute(1, 2, 0, 3),
        key_sbkd.permute(1, 2, 0, 3),
        value_sbkd.permute(1, 2, 0, 3),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query_sbnd.shape[2] != key_sbkd.shape[2],
    )
    return context_bnsd.permute(2, 0, 1, 3)


def attend_squarely(
    kernel: SDPBackend,
    query_sbnd: Tensor,
    key_sbkd: Tensor,
    value_sbkd: Tensor,
    *,
    scale: float,
    causal: bool,
    dropout: float,
    window: int = 0,
    **refused: object,
) -> Tensor:
    """Attend with one kernel of torch, whose causal mask is aligned to the top left; the rest of `Attend` is refused.

    Raises:
        ValueError: the kernel cannot compute this.
        RuntimeError: torch finds that it cannot.
    """
    extras = [extra for extra, value in refused.items() if value is not None and value]
    if window:
        extras.append("window")
    if extras:
        raise ValueError(f"{_name(kernel)} does not take {', '.join(extras)}")
    # The last query sees every key.
    if causal and 1 < query_sbnd.shape[0] != key_sbkd.shape[0]:
        raise ValueError(f"{_name(kernel)} aligns causal masks to the first key: it needs as many queries as keys")
    with sdpa_kernel(kernel):
        return call_torch(
            query_sbnd, key_sbkd, value_sbkd, scale=scale, is_causal=causal and query_sbnd.shape[0] > 1, dropout=dropout
        )


def _name(kernel: SDPBackend) -> str:
    return f"sdpa_{kernel.name.split('_')[0].lower()}"


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


def _preference(request: AttentionRequest) -> int:
    """Stand above this project's kernels, but where documents or a window would be a mask of s x s."""
    return 10 if request.documents or request.window else 40


BACKEND = AttentionBackend(
    name="sdpa",
    choose_when="torch's fused kernels, no s x s weights in memory",
    preference=_preference,
    attend=attend,
    in_products="fused without dropout",
    features=ALL_FEATURES - {"softcap"},
)
