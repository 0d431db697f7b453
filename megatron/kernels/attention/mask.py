"""Boolean attention masks, True = may attend, and how many pairs causality and a window leave."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.constant import cached_constant


@cached_constant(maxsize=8)
def causal_mask(query_length: int, key_length: int, device: torch.device, window: int = 0) -> Tensor:
    """Make a bool mask [s, s'], aligned to the bottom right: query i sees keys 0 .. s' - s + i, or the last of these.

    Made on the host, moved once, kept for the few lengths that a run uses.
    """
    offset = key_length - query_length
    mask = torch.ones(query_length, key_length, dtype=torch.bool, device="cpu").tril_(offset)
    if window:
        mask.triu_(offset - window + 1)
    return mask.to(device)


def combine_masks(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, window: int = 0) -> Tensor | None:
    """Combine what `causal`, `window` and `mask` say into one mask; None when every query sees every key.

    Query and key are [s, b, ., .]. A single query comes last: it sees every key, causal or not.

    Raises:
        ValueError: there is a window without `causal`.
    """
    query_length, key_length = query.shape[0], key.shape[0]
    if window and not causal:
        raise ValueError("a window looks back from each query: it needs causal attention")
    window = window if window < key_length else 0
    if not causal or (query_length == 1 and not window):
        return mask
    looks_back = causal_mask(query_length, key_length, query.device, window)
    return looks_back if mask is None else mask & looks_back


def and_causal(mask: Tensor, window: int = 0) -> Tensor:
    """Keep queries of a mask [b,1,s,s'] from later keys as well: done once, it serves every layer."""
    return mask & causal_mask(mask.shape[-2], mask.shape[-1], mask.device, window)


def and_documents(mask: Tensor | None, bounds: Tensor | None) -> Tensor | None:
    """Keep the documents of a sample apart as well: `bounds` are those of `document_bounds`, int32 [b, 2, s]."""
    if bounds is None:
        return mask
    begins_bs, ends_bs = bounds.unbind(1)
    places = torch.arange(bounds.shape[-1], device=bounds.device)
    inside = (places >= begins_bs[:, None, :, None]) & (places < ends_bs[:, None, :, None])
    return inside if mask is None else mask & inside


def pairs_seen(queries: int, keys: int, causal: bool, window: int) -> int:
    """Count the pairs of a query and a key that it sees. Documents are not known here: what they hide is counted."""
    if not causal:
        return queries * keys
    widest = min(window, keys) if window else keys

    def up_to(last: int) -> int:
        """Add up what queries see whose own key is one of the first `last`."""
        rising = min(last, widest)
        return rising * (rising + 1) // 2 + (last - rising) * widest

    return up_to(keys) - up_to(keys - queries)
