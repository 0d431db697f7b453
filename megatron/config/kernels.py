"""Which implementation computes an operation, and which activations are recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import at_least, flag


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Choice of kernels and of activation recompute."""

    title: ClassVar[str] = "kernels"

    attention_backend: str = flag(
        "auto",
        choices=(
            "auto",
            "unfused",
            "sdpa",
            "sdpa_flash",
            "sdpa_cudnn",
            "flash_triton",
            "flash_v1",
            "flash_v2",
            "flash_v4",
        ),
        help="implementation of attention; auto takes the fastest that can honour the request and says why",
    )
    recompute_granularity: str = flag(
        "none",
        choices=("none", "full"),
        help="activations that backward computes again instead of keeping: none, or whole blocks",
    )
    recompute_num_layers: int = flag(
        1, range=at_least(1), help="blocks recomputed as one unit under --recompute-granularity full"
    )
