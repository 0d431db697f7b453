"""Boolean attention masks, True = may attend."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.constant import cached_constant


@cached_constant(maxsize=8)
def causal_mask(query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Make a bool mask [s, s'], aligned to the bottom right: query i sees keys 0 .. s' - s + i.

    Made on the host, moved once, kept for the few lengths that a run uses.
    """
    mask = torch.ones(query_length, key_length, dtype=torch.bool, device="cpu").tril_(key_length - query_length)
    return mask.to(device)


def combine_masks(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor | None:
    """Combine what `causal` and `mask` say into one mask; None when every query sees every key.

    Query and key are [s, b, ., .]. A single query comes last: it sees every key, causal or not.
    """
    query_length, key_length = query.shape[0], key.shape[0]
    if not causal or query_length == 1:
        return mask
    return causal_mask(query_length, key_length, query.device) if mask is None else and_causal(mask)


def and_causal(mask: Tensor) -> Tensor:
    """Keep queries of a mask [b,1,s,s'] from later keys as well: done once, it serves every layer."""
    return mask & causal_mask(mask.shape[-2], mask.shape[-1], mask.device)
