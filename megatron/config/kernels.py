"""Which implementation computes an operation, and which activations are kept or recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import NOT_NEGATIVE, at_least, flag


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Choice of kernels and of activation recompute."""

    title: ClassVar[str] = "kernels"

    attention_backend: str = flag(
        "auto",
        choices=("auto", "unfused", "sdpa"),
        help="implementation of attention; auto takes the fastest that can honour the request and says why",
    )
    loss_chunk_size: int = flag(
        0,
        range=NOT_NEGATIVE,
        help="tokens whose logits exist at a time: the output head and the loss are computed as one, a chunk after the "
        "other; 0: all logits at once",
    )
    recompute_granularity: str = flag(
        "none",
        choices=("none", "full"),
        help="activations that backward computes again instead of keeping: none, or whole blocks",
    )
    recompute_num_layers: int = flag(
        1, range=at_least(1), help="blocks recomputed as one unit under --recompute-granularity full"
    )
