"""Rules of the training's length, its batches and its precision."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.config.flags import spell
from megatron.config.training import TrainingConfig


def training_has_an_end(training: TrainingConfig) -> Iterator[str]:
    """Something says when the training is done."""
    limits = (training.train_iters, training.train_samples, training.train_tokens)
    if not training.skip_train and all(limit is None for limit in limits):
        yield "how long to train is open: give --train-iters, --train-samples or --train-tokens (or --skip-train)."


def evaluating_only_evaluates(training: TrainingConfig) -> Iterator[str]:
    """A run that does not train must do something."""
    if training.skip_train and training.eval_iters == 0:
        yield "--skip-train with --eval-iters 0 leaves nothing to do: raise --eval-iters."


def micro_batches_divide_the_batch(training: TrainingConfig, data_parallel_size: int) -> Iterator[str]:
    """All ranks take the same number of whole micro-batches."""
    step = training.micro_batch_size * data_parallel_size
    if training.global_batch_size % step:
        yield (
            f"--global-batch-size {training.global_batch_size} is not a multiple of --micro-batch-size "
            f"{training.micro_batch_size} x {data_parallel_size} data-parallel ranks = {step}."
        )


def ramp_reaches_the_batch(training: TrainingConfig) -> Iterator[str]:
    """The increments lead from the start to the global batch size exactly."""
    if len(training.rampup_batch_size) != 3:
        return
    start, increment, _ = training.rampup_batch_size
    growth = training.global_batch_size - start
    if growth < 0:
        yield f"--rampup-batch-size starts at {start}, above --global-batch-size {training.global_batch_size}."
    elif growth % increment:
        yield (
            f"--rampup-batch-size goes from {start} in steps of {increment}, which do not reach --global-batch-size "
            f"{training.global_batch_size}."
        )


def micro_batches_divide_the_ramp(training: TrainingConfig, data_parallel_size: int) -> Iterator[str]:
    """Every batch of the ramp is made of whole micro-batches on all ranks."""
    step = training.micro_batch_size * data_parallel_size
    for name, size in zip(("start", "increment"), training.rampup_batch_size[:2], strict=False):
        if size % step:
            yield (
                f"--rampup-batch-size has the {name} {size}, which is not a multiple of --micro-batch-size "
                f"{training.micro_batch_size} x {data_parallel_size} data-parallel ranks = {step}."
            )


def loss_scales_are_powers_of_two(training: TrainingConfig) -> Iterator[str]:
    """Scaling by a power of two is exact."""
    for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
        value = getattr(training, name)
        if value is not None and 0 < value < math.inf and not math.log2(value).is_integer():
            yield f"{spell(name)} {value:g} must be a power of two, so that scaling rounds nothing."


def loss_scale_is_for_fp16(training: TrainingConfig) -> Iterator[str]:
    """Only fp16 needs its gradients lifted."""
    if training.loss_scale is not None and training.precision != "fp16":
        yield f"--loss-scale {training.loss_scale:g} has no effect with --precision {training.precision}: drop it."


def dynamic_loss_scale_starts_above_its_floor(training: TrainingConfig) -> Iterator[str]:
    """The dynamic scale starts inside its range."""
    if training.initial_loss_scale < training.min_loss_scale:
        yield (
            f"--initial-loss-scale {training.initial_loss_scale:g} is below --min-loss-scale "
            f"{training.min_loss_scale:g}."
        )
