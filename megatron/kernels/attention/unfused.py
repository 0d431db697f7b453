"""Attention written out: the reference that every other backend is tested against.

Choose it to check another backend. It keeps all s x s weights in memory for backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.attention.interface import AttentionBackend, prefer
from megatron.kernels.attention.mask import and_documents, combine_masks


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
    """See `Attend`. The softmax is computed in fp32. Documents, as bounds, become a mask."""
    query_length, batch, heads, head_size = query_sbnd.shape
    key_length, _, groups, _ = key_sbkd.shape
    # The query heads of a group become rows of one product with the group's keys, so that keys are never repeated.
    query = query_sbnd.permute(1, 2, 0, 3).reshape(batch * groups, heads // groups * query_length, head_size)
    key = key_sbkd.permute(1, 2, 3, 0).reshape(batch * groups, head_size, key_length)
    value = value_sbkd.permute(1, 2, 0, 3).reshape(batch * groups, key_length, head_size)

    scores = torch.baddbmm(query.new_empty(()), query, key, beta=0.0, alpha=scale)
    scores = scores.view(batch, heads, query_length, key_length)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = combine_masks(query_sbnd, key_sbkd, causal=causal, mask=and_documents(mask, documents), window=window)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), dropout)
    context = torch.bmm(weights.view(batch * groups, -1, key_length), value)
    return context.view(batch, heads, query_length, head_size).permute(2, 0, 1, 3)


BACKEND = AttentionBackend(
    name="unfused",
    choose_when="the reference, written out in plain torch",
    preference=prefer(0),
    attend=attend,
)
