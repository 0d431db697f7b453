"""Learning rate and weight decay as pure functions of progress, with the formulas of Megatron-LM's scheduler.

Progress is what was consumed *before* the step, in the schedule's own unit: the first step of a warm-up runs at the
initial rate, as it does in Megatron-LM.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.optimizer import OptimizerConfig
from megatron.config.training import TrainingConfig
from megatron.training.state import TrainState, Unit

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


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the optimizer is told at each step."""

    learning_rate: LearningRate
    weight_decay: WeightDecay

    def at(self, state: TrainState) -> tuple[float, float]:
        """Learning rate and weight decay of the step that starts in `state`."""
        rate, decay = self.learning_rate, self.weight_decay
        return rate.at(state.progress(rate.unit)), decay.at(state.progress(decay.unit))

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Give all fields as JSON; no end is null."""
        return {
            name: {key: None if value == math.inf else value for key, value in part.items()}
            for name, part in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Schedule:
        """Read what `to_json` gave.

        Raises:
            TypeError: a field is missing or unknown.
            KeyError: one of the two parts is missing.
        """
        parts: list[dict[str, Any]] = [
            {key: math.inf if key == "length" and value is None else value for key, value in values[name].items()}
            for name in ("learning_rate", "weight_decay")
        ]
        return cls(learning_rate=LearningRate(**parts[0]), weight_decay=WeightDecay(**parts[1]))

    def changes(self, new: Schedule) -> list[str]:
        """List what is otherwise in another schedule, as `--flag old -> new`; empty when both give the same values."""
        old_values, new_values = self._effective(), new._effective()
        return [
            f"{name} {_spoken(old_values.get(name))} -> {_spoken(new_values.get(name))}"
            for name in {**old_values, **new_values}
            if old_values.get(name) != new_values.get(name)
        ]

    def _effective(self) -> dict[str, Any]:
        """Name the values that decide, by the flags that set them."""
        rate, decay = self.learning_rate, self.weight_decay
        suffix = FLAG_SUFFIX[rate.unit]
        values: dict[str, Any] = {"--lr": rate.peak, "--lr-decay-style": rate.style}
        if rate.warmup > 0:
            values |= {"--lr-warmup-init": rate.initial, f"--lr-warmup-{suffix}": rate.warmup}
        if rate.style != "constant":
            length = f"--lr-decay-{suffix} (without it --train-{suffix})"
            values |= {"--min-lr": rate.minimum, length: rate.length}
        if rate.style == "WSD":
            values |= {"--lr-wsd-decay-style": rate.wsd_style, f"--lr-wsd-decay-{suffix}": rate.wsd_length}
        if decay.style == "constant":
            return values | {"--weight-decay": decay.end}
        values |= {"--weight-decay-incr-style": decay.style, f"--train-{FLAG_SUFFIX[decay.unit]}": decay.length}
        return values | {"--start-weight-decay": decay.start, "--end-weight-decay": decay.end}


def _spoken(value: Any) -> str:
    return "nothing" if value is None or value == math.inf else str(value)


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
