"""What a run asks of attention, and what a backend says of itself.

Legend: s sequence, b batch, n query heads, k key/value heads (n is a multiple of k), d head size. The heads of a group
are neighbours: query head i reads key/value head i // (n / k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Attend(Protocol):
    """Compute dropout(softmax(scale x query key^T + mask)) value.

    Args:
        query_sbnd: [s, b, n, d].
        key_sbkd: [s', b, k, d] with s' >= s: the keys before those of the queries come from a cache.
        value_sbkd: as the keys.
        scale: usually 1 / sqrt(d).
        causal: whether query i sees only the keys 0 .. s' - s + i (aligned to the bottom right).
        dropout: probability of dropping a weight, 0 outside training.
        mask: bool [b or 1, 1, s, s'], True = may attend; it must leave each query a key. With `causal`, both hold.

    Returns:
        [s, b, n, d].
    """

    def __call__(
        self,
        query_sbnd: Tensor,
        key_sbkd: Tensor,
        value_sbkd: Tensor,
        *,
        scale: float,
        causal: bool,
        dropout: float,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See the class."""


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What a run needs. Each True (or non-zero) field after `device_type` is a feature that the backend must have."""

    head_size: int
    dtype: torch.dtype
    device_type: str
    dropout: float = 0.0
    gqa: bool = False
    documents: bool = False
    """Masks that keep the documents of one sample, or padding, apart."""
    cache: bool = False
    """More keys than queries: generation."""
    causal: bool = True
    """False: every query sees every key."""

    @property
    def features(self) -> frozenset[str]:
        """Names of the features that this request cannot do without."""
        needed = {
            "dropout": self.dropout > 0,
            "gqa": self.gqa,
            "documents": self.documents,
            "cache": self.cache,
            "bidirectional": not self.causal,
        }
        return frozenset(name for name, is_needed in needed.items() if is_needed)


ALL_FEATURES = frozenset({"dropout", "gqa", "documents", "cache", "bidirectional"})
ALL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def always_available() -> str | None:
    """Say nothing: for backends that need nothing but torch."""
    return None


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """One implementation of attention and the limits of what it can do."""

    name: str
    choose_when: str
    """When a user should want it: half a sentence, printed beside the choice."""
    preference: int
    """`auto` takes the highest among those that can honour the request: the order of speed."""
    attend: Attend
    unavailable: Callable[[], str | None] = always_available
    """Why this machine cannot run it (a missing package, too old a device), or None."""
    features: frozenset[str] = ALL_FEATURES
    dtypes: frozenset[torch.dtype] = ALL_DTYPES
    device_types: frozenset[str] = frozenset({"cpu", "cuda"})
    max_head_size: int | None = None
    dense_document_mask: bool = True
    """Whether documents reach it as a bool mask [b,1,s,s]."""

    def why_not(self, request: AttentionRequest) -> str | None:
        """Say why this backend cannot honour a request here; None when it can."""
        missing = sorted(request.features - self.features)
        if missing:
            return f"it lacks {', '.join(missing)}"
        if request.device_type not in self.device_types:
            return f"it does not run on {request.device_type}"
        if request.dtype not in self.dtypes:
            return f"it does not compute in {str(request.dtype).removeprefix('torch.')}"
        if self.max_head_size is not None and request.head_size > self.max_head_size:
            return f"its heads have at most {self.max_head_size} channels, not {request.head_size}"
        return self.unavailable()
