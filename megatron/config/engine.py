"""DeepSpeed: its ZeRO stage, offload, buckets and the user's own JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import DERIVED, at_least, flag


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What becomes DeepSpeed's configuration dictionary."""

    title: ClassVar[str] = "engine"

    zero_stage: int = flag(
        DERIVED,
        choices=("0", "1", "2", "3"),
        help="ZeRO: 1 shards optimizer state over data-parallel ranks, 2 gradients too, 3 weights too",
        derived="the stage in --deepspeed_config, else 1",
    )
    deepspeed_config: str | None = flag(
        None, metavar="FILE", help="DeepSpeed JSON, merged with the flags; a contradiction is an error"
    )
    cpu_optimizer: bool = flag(False, help="keep optimizer state and its step on the host (ZeRO 1-3)")
    remote_device: str = flag(
        "none",
        choices=("none", "cpu"),
        help="where a rank's share of the weights is kept: none is the device itself, cpu the host (ZeRO 3)",
    )
    zero_reduce_bucket_size: int = flag(
        100_000_000, range=at_least(1), help="elements of one gradient-reduction bucket"
    )
    zero_allgather_bucket_size: int = flag(
        100_000_000, range=at_least(1), help="elements of one parameter-gathering bucket"
    )
