"""What a run asks of attention, and what a backend says of itself.

Legend: s sequence, b batch, n query heads, k key/value heads (n is a multiple of k), d head size. The heads of a group
are neighbours: query head i reads key/value head i // (n / k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron.kernels.attention.documents import document_bounds


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
        documents: what the backend's `prepare_documents` made: tokens attend inside their own document; s' = s.
        window: how many keys a query sees, its own and those just before, with `causal` alone; 0: all.
        softcap: c of c tanh(logits / c), which bounds the logits before they are masked; 0: none.

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
        documents: Any = None,
        window: int = 0,
        softcap: float = 0.0,
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
    """Tokens attend inside their own document of a sample."""
    mask: bool = False
    """Any other mask: padding while generating."""
    window: bool = False
    """Each query sees a limited number of keys before it."""
    softcap: bool = False
    """Logits are bounded by a tanh."""
    cache: bool = False
    """More keys than queries: generation."""
    causal: bool = True
    """False: every query sees every key."""
    sequence_length: int | None = None
    """How many queries there are at most, where it is known: which backend is the fastest may depend on it."""

    @property
    def features(self) -> frozenset[str]:
        """Names of the features that this request cannot do without."""
        needed = {
            "dropout": self.dropout > 0,
            "gqa": self.gqa,
            "documents": self.documents,
            "mask": self.mask,
            "window": self.window,
            "softcap": self.softcap,
            "cache": self.cache,
            "bidirectional": not self.causal,
        }
        return frozenset(name for name, is_needed in needed.items() if is_needed)


ALL_FEATURES = frozenset({"dropout", "gqa", "documents", "mask", "window", "softcap", "cache", "bidirectional"})
HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})
ALL_DTYPES = HALF_DTYPES | {torch.float32}


def always_available() -> str | None:
    """Say nothing: for backends that need nothing but torch."""
    return None


def no_limits(request: AttentionRequest) -> str | None:
    """Say nothing: for backends that do alike on every GPU that they run on."""
    del request
    return None


def prefer(rank: int) -> Callable[[AttentionRequest], int]:
    """Prefer a backend alike for every request."""
    return lambda request: rank


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """One implementation of attention and the limits of what it can do."""

    name: str
    choose_when: str
    """When a user should want it: half a sentence, printed beside the choice."""
    preference: Callable[[AttentionRequest], int]
    """`auto` takes the highest among those that can honour the request: the order of speed."""
    attend: Attend
    unavailable: Callable[[], str | None] = always_available
    """Why this machine cannot run it (a missing package, too old a device), or None."""
    limits: Callable[[AttentionRequest], str | None] = no_limits
    """Why the GPU that is here cannot do a request that others can, or None."""
    features: frozenset[str] = ALL_FEATURES
    excludes: tuple[frozenset[str], ...] = ()
    """Features that it has, but not together."""
    dtypes: frozenset[torch.dtype] = ALL_DTYPES
    device_types: frozenset[str] = frozenset({"cpu", "cuda"})
    in_products: Literal["opaque", "written out", "fused", "fused without dropout"] = "opaque"
    """How recompute that keeps products sees it: not at all; as two products of torch's; as one of its own, whose FLOPs
    are registered with torch, always or unless it draws the numbers of dropout itself."""
    max_head_size: int | None = None
    head_size_multiple: int = 1
    head_sizes: tuple[int, ...] = ()
    """The only ones, where it is not known to be right with all others."""
    dense_document_mask: bool = True
    """Whether documents reach it as a bool mask [b, 1, s, s], else through `prepare_documents`."""
    prepare_documents: Callable[[Tensor], Any] = document_bounds
    """Makes `documents`, once a micro-batch for all layers, from document ids [b, s]."""

    def why_not(self, request: AttentionRequest) -> str | None:
        """Say why this backend cannot honour a request here; None when it can."""
        missing = sorted(request.features - self.features)
        if missing:
            return f"it lacks {', '.join(missing)}"
        for together in self.excludes:
            if together <= request.features:
                return f"it lacks {' with '.join(sorted(together))}"
        if request.device_type not in self.device_types:
            return f"it does not run on {request.device_type}"
        if request.dtype not in self.dtypes:
            return f"it does not compute in {str(request.dtype).removeprefix('torch.')}"
        if self.max_head_size is not None and request.head_size > self.max_head_size:
            return f"its heads have at most {self.max_head_size} channels, not {request.head_size}"
        if self.head_sizes and request.head_size not in self.head_sizes:
            *sizes, last = map(str, self.head_sizes)
            return f"its heads have {', '.join(sizes)} or {last} channels, not {request.head_size}"
        if request.head_size % self.head_size_multiple:
            return f"its heads have a multiple of {self.head_size_multiple} channels, not {request.head_size}"
        return self.unavailable() or self.limits(request)
