"""Where checkpoints go, when, and which are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import NOT_NEGATIVE, at_least, flag


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    title: ClassVar[str] = "checkpoint"

    save: str | None = flag(None, metavar="DIR", help="folder that receives checkpoints")
    save_interval: int | None = flag(
        None, range=at_least(1), help="optimizer steps between checkpoints (default: only when leaving)"
    )
    keep_last: int = flag(0, range=NOT_NEGATIVE, help="newest checkpoints to keep in --save; 0 keeps all")
    keep_every: int = flag(
        0, range=NOT_NEGATIVE, help="checkpoints of steps that are multiples of this stay for ever; 0 is none"
    )
    async_save: bool = flag(
        False, help="write checkpoints while the training goes on, from copies in the memory of the hosts"
    )
    load: str | None = flag(None, metavar="DIR", help="folder whose newest complete checkpoint is resumed")
    load_if_exists: bool = flag(False, help="start from scratch when --load holds no checkpoint, instead of an error")
    no_load_rng: bool = flag(False, help="keep the fresh random-number state instead of the checkpoint's")
