"""Learning rate and weight decay as pure functions of progress, with the formulas of Megatron-LM's scheduler.

Progress is what was consumed *before* the step, in the schedule's own unit: the first step of a warm-up runs at the
initial rate, as it does in Megatron-LM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.optimizer import OptimizerConfig
from megatron.config.training import TrainingConfig
from megatron.training.state import Unit

FLAG_SUFFIX: dict[Unit, str] = {"iterations": "iters", "samples": "samples", "tokens": "tokens"}


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Linear warm-up, then decay by a named shape. Lengths are in `unit` and count from the start of the training."""

    unit: Unit
    style: str
    peak: float
    minimum: float = 0.0
    initial: float = 0.0
    warmup: float = 0
    length: float = math.inf
    wsd_style: str = "exponential"
    wsd_length: float = 0

    def at(self, progress: int) -> float:
        """Give the learning rate of the step that starts after `progress`."""
        if self.warmup > 0 and progress <= self.warmup:
            return self.initial + (self.peak - self.initial) * progress / self.warmup
        if self.style == "constant":
            return self.peak
        if progress > self.length:
            return self.minimum
        if self.style == "inverse-square-root":
            return max(self.minimum, self.peak * math.sqrt(max(self.warmup, 1)) / math.sqrt(max(progress, 1)))
        return self.minimum + self._share(progress) * (self.peak - self.minimum)

    def _share(self, progress: int) -> float:
        """Give the share of the way from the minimum to the peak that is left, in [0, 1]."""
        if self.style == "WSD":
            start = self.length - self.wsd_length
            return 1.0 if progress <= start else decayed(self.wsd_style, (progress - start) / self.wsd_length)
        return decayed(self.style, (progress - self.warmup) / (self.length - self.warmup))


def decayed(style: str, ratio: float) -> float:
    """Fall from 1 at `ratio` 0 to 0 at `ratio` 1, by the shape's name."""
    match style:
        case "linear":
            return 1.0 - ratio
        case "cosine":
            return 0.5 * (math.cos(math.pi * ratio) + 1.0)
        case "exponential":
            return 2.0 * 0.5**ratio - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(ratio)
    raise ValueError(f"there is no decay style {style!r}")


@dataclass(frozen=True, kw_only=True)
class WeightDecay:
    """A ramp of the weight decay over `length`, counted in `unit`."""

    unit: Unit
    style: str
    start: float
    end: float
    length: float = math.inf

    def at(self, progress: int) -> float:
        """Give the weight decay of the step that starts after `progress`."""
        if self.style == "constant" or progress > self.length:
            return self.end
        return self.start + (1.0 - decayed(self.style, progress / self.length)) * (self.end - self.start)


def training_length(training: TrainingConfig) -> dict[Unit, int]:
    """List the limits that were given, by unit, in the order iterations, samples, tokens."""
    limits: dict[Unit, int | None] = {
        "iterations": training.train_iters,
        "samples": training.train_samples,
        "tokens": training.train_tokens,
    }
    return {unit: limit for unit, limit in limits.items() if limit is not None}


def build_learning_rate(optimizer: OptimizerConfig, training: TrainingConfig) -> LearningRate:
    """Make the schedule that the flags describe.

    Its unit is that of the `--lr-*` length flags, else that of the training's limit. That the lengths fit into each
    other is a rule of the config.
    """
    limits = training_length(training)
    unit = _unit_of(optimizer) or _unit_of_training(training)
    suffix = FLAG_SUFFIX[unit]
    length = getattr(optimizer, f"lr_decay_{suffix}") or limits.get(unit, math.inf)
    warmup = getattr(optimizer, f"lr_warmup_{suffix}")
    if optimizer.lr_warmup_fraction is not None:
        warmup = optimizer.lr_warmup_fraction * length
    return LearningRate(
        unit=unit,
        style=optimizer.lr_decay_style,
        peak=optimizer.lr,
        minimum=optimizer.min_lr,
        initial=optimizer.lr_warmup_init,
        warmup=warmup,
        length=length,
        wsd_style=optimizer.lr_wsd_decay_style,
        wsd_length=getattr(optimizer, f"lr_wsd_decay_{suffix}") or 0,
    )


def build_weight_decay(optimizer: OptimizerConfig, training: TrainingConfig) -> WeightDecay:
    """Make the ramp that the flags describe, over the whole training."""
    unit = _unit_of_training(training)
    return WeightDecay(
        unit=unit,
        style=optimizer.weight_decay_incr_style,
        start=optimizer.start_weight_decay,
        end=optimizer.end_weight_decay,
        length=training_length(training).get(unit, math.inf),
    )


def _unit_of(optimizer: OptimizerConfig) -> Unit | None:
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        for unit, suffix in FLAG_SUFFIX.items():
            if getattr(optimizer, f"{name}_{suffix}"):
                return unit
    return None


def _unit_of_training(training: TrainingConfig) -> Unit:
    return next(iter(training_length(training)), "iterations")
