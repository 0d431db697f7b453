"""Rules of the learning-rate and weight-decay schedules."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.flags import spell
from megatron.config.optimizer import OptimizerConfig
from megatron.config.training import TrainingConfig

UNITS = ("iters", "samples", "tokens")
LENGTHS = ("lr_decay", "lr_warmup", "lr_wsd_decay")


def _given_lengths(optimizer: OptimizerConfig, unit: str) -> list[str]:
    """List the schedule's length flags that were given in a unit."""
    return [f"{length}_{unit}" for length in LENGTHS if getattr(optimizer, f"{length}_{unit}")]


def _unit(optimizer: OptimizerConfig, training: TrainingConfig) -> str:
    """Say what the schedule counts in: the unit of its own flags, else that of the training's limit."""
    of_flags = [unit for unit in UNITS if _given_lengths(optimizer, unit)]
    of_training = [unit for unit in UNITS if getattr(training, f"train_{unit}") is not None]
    return next(iter(of_flags + of_training), "iters")


def _decay_length(optimizer: OptimizerConfig, training: TrainingConfig) -> int | None:
    unit = _unit(optimizer, training)
    length: int | None = getattr(optimizer, f"lr_decay_{unit}") or getattr(training, f"train_{unit}")
    return length


def _warmup_length(optimizer: OptimizerConfig, training: TrainingConfig) -> float:
    if optimizer.lr_warmup_fraction is not None:
        return optimizer.lr_warmup_fraction * (_decay_length(optimizer, training) or 0)
    warmup: int = getattr(optimizer, f"lr_warmup_{_unit(optimizer, training)}")
    return warmup


def schedule_has_one_unit(optimizer: OptimizerConfig) -> Iterator[str]:
    """Iterations, samples and tokens do not mix in one schedule."""
    by_unit = {unit: _given_lengths(optimizer, unit) for unit in UNITS}
    used = {unit: names for unit, names in by_unit.items() if names}
    if len(used) > 1:
        flags = ", ".join(f"{spell(name)} {getattr(optimizer, name)}" for names in used.values() for name in names)
        yield f"the learning rate's schedule mixes {' and '.join(used)}: {flags}; give all lengths in one unit."


def warmup_is_given_once(optimizer: OptimizerConfig) -> Iterator[str]:
    """The warm-up is a share or a number, not both."""
    for unit in UNITS:
        length = getattr(optimizer, f"lr_warmup_{unit}")
        if optimizer.lr_warmup_fraction is not None and length:
            yield (
                f"--lr-warmup-fraction {optimizer.lr_warmup_fraction:g} and --lr-warmup-{unit} {length} both set the "
                f"warm-up: give one."
            )


def decay_has_a_length(optimizer: OptimizerConfig, training: TrainingConfig) -> Iterator[str]:
    """A schedule knows its end, in its own unit."""
    if training.skip_train or _decay_length(optimizer, training) is not None:
        return
    unit = _unit(optimizer, training)
    trains = any(getattr(training, f"train_{other}") is not None for other in UNITS)
    style, share = optimizer.lr_decay_style, optimizer.lr_warmup_fraction
    if trains and (style != "constant" or share is not None):
        what = f"--lr-decay-style {style}" if style != "constant" else f"--lr-warmup-fraction {share:g}"
        yield f"{what} counts in {unit}, but nothing says how many: give --lr-decay-{unit} or --train-{unit}."


def warmup_is_shorter_than_decay(optimizer: OptimizerConfig, training: TrainingConfig) -> Iterator[str]:
    """The warm-up ends before the schedule does."""
    unit, length = _unit(optimizer, training), _decay_length(optimizer, training)
    warmup = _warmup_length(optimizer, training)
    if length and optimizer.lr_decay_style != "constant" and warmup >= length:
        end = f"--lr-decay-{unit}" if getattr(optimizer, f"lr_decay_{unit}") else f"--train-{unit}"
        yield f"--lr-warmup-{unit} {warmup:g} does not end before the schedule does, at {end} {length}."


def wsd_decay_fits(optimizer: OptimizerConfig, training: TrainingConfig) -> Iterator[str]:
    """The last part of a WSD schedule has a length, and room after the warm-up."""
    if optimizer.lr_decay_style != "WSD":
        return
    unit, length = _unit(optimizer, training), _decay_length(optimizer, training)
    decay = getattr(optimizer, f"lr_wsd_decay_{unit}")
    if decay is None:
        yield f"--lr-decay-style WSD needs the length of its decay: give --lr-wsd-decay-{unit}."
    elif length and decay > length - _warmup_length(optimizer, training):
        yield (
            f"--lr-wsd-decay-{unit} {decay} is longer than what the warm-up leaves of the schedule's {length} {unit}: "
            f"shorten it, or the warm-up (--lr-warmup-{unit})."
        )


def wsd_lengths_are_for_wsd(optimizer: OptimizerConfig) -> Iterator[str]:
    """The length of WSD's decay means nothing to other styles."""
    for unit in UNITS:
        length = getattr(optimizer, f"lr_wsd_decay_{unit}")
        if length is not None and optimizer.lr_decay_style != "WSD":
            yield (
                f"--lr-wsd-decay-{unit} {length} has no effect with --lr-decay-style {optimizer.lr_decay_style}: "
                f"write --lr-decay-style WSD, or drop it."
            )


def learning_rates_are_ordered(optimizer: OptimizerConfig) -> Iterator[str]:
    """The peak is the highest learning rate."""
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(optimizer, name) > optimizer.lr:
            yield f"{spell(name)} {getattr(optimizer, name):g} is above --lr {optimizer.lr:g}, the peak."


def weight_decay_ramp_has_a_shape(optimizer: OptimizerConfig) -> Iterator[str]:
    """A ramp of the weight decay has both its ends and its shape."""
    style, ends = optimizer.weight_decay_incr_style, (optimizer.start_weight_decay, optimizer.end_weight_decay)
    if style == "constant" and ends != (optimizer.weight_decay, optimizer.weight_decay):
        yield (
            f"--start-weight-decay {ends[0]:g} and --end-weight-decay {ends[1]:g} differ from --weight-decay "
            f"{optimizer.weight_decay:g}, but --weight-decay-incr-style is constant: choose linear or cosine."
        )
    if style != "constant" and ends[0] == ends[1]:
        yield (
            f"--weight-decay-incr-style {style} has nowhere to go: give --start-weight-decay and --end-weight-decay, "
            f"which are both {ends[0]:g}."
        )
