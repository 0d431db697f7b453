"""The optimizer, the learning rate and the weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import DERIVED, NOT_NEGATIVE, PROBABILITY, at_least, flag


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and schedules. A schedule's unit is iterations, samples or tokens: one of the three flags."""

    title: ClassVar[str] = "optimizer"

    optimizer: str = flag("adam", choices=("adam", "sgd"), help="adam is AdamW; sgd is plain, with momentum")
    lr: float = flag(range=NOT_NEGATIVE, help="peak learning rate")
    min_lr: float = flag(0.0, range=NOT_NEGATIVE, help="learning rate at the end of the decay")
    lr_decay_style: str = flag(
        "linear",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
        help="shape of the learning rate after warm-up",
    )
    lr_decay_iters: int | None = flag(
        None, range=at_least(1), help="length of the schedule in optimizer steps (default: the training)"
    )
    lr_decay_samples: int | None = flag(None, range=at_least(1), help="length of the schedule in samples")
    lr_decay_tokens: int | None = flag(None, range=at_least(1), help="length of the schedule in tokens")
    lr_warmup_fraction: float | None = flag(
        None, range=PROBABILITY, help="length of the warm-up as a share of the schedule"
    )
    lr_warmup_iters: int = flag(0, range=NOT_NEGATIVE, help="length of the linear warm-up in optimizer steps")
    lr_warmup_samples: int = flag(0, range=NOT_NEGATIVE, help="length of the linear warm-up in samples")
    lr_warmup_tokens: int = flag(0, range=NOT_NEGATIVE, help="length of the linear warm-up in tokens")
    lr_warmup_init: float = flag(0.0, range=NOT_NEGATIVE, help="learning rate before the first step of the warm-up")
    lr_wsd_decay_style: str = flag(
        "exponential",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
        help="shape of the last part of a WSD (warm-up, stable, decay) schedule",
    )
    lr_wsd_decay_iters: int | None = flag(None, range=at_least(1), help="length of WSD's decay in optimizer steps")
    lr_wsd_decay_samples: int | None = flag(None, range=at_least(1), help="length of WSD's decay in samples")
    lr_wsd_decay_tokens: int | None = flag(None, range=at_least(1), help="length of WSD's decay in tokens")

    weight_decay: float = flag(0.01, range=NOT_NEGATIVE, help="decoupled weight decay; biases and norms have none")
    start_weight_decay: float = flag(
        DERIVED, range=NOT_NEGATIVE, help="weight decay at the start of a ramp", derived="weight_decay"
    )
    end_weight_decay: float = flag(
        DERIVED, range=NOT_NEGATIVE, help="weight decay at the end of a ramp", derived="weight_decay"
    )
    weight_decay_incr_style: str = flag(
        "constant", choices=("constant", "linear", "cosine"), help="shape of the weight-decay ramp over the training"
    )
    clip_grad: float = flag(1.0, range=NOT_NEGATIVE, help="largest global gradient norm; 0 switches clipping off")
    adam_beta1: float = flag(0.9, range=PROBABILITY, help="decay of Adam's mean")
    adam_beta2: float = flag(0.999, range=PROBABILITY, help="decay of Adam's variance")
    adam_eps: float = flag(1e-8, range=NOT_NEGATIVE, help="added to the root of Adam's variance")
    sgd_momentum: float = flag(0.9, range=PROBABILITY, help="momentum of SGD")

    def __post_init__(self) -> None:
        """Let the ends of the ramp default to the constant."""
        for name in ("start_weight_decay", "end_weight_decay"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.weight_decay)
