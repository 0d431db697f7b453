"""How long to train, on what batches, in which precision, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import DERIVED, NOT_NEGATIVE, POSITIVE, at_least, flag


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    title: ClassVar[str] = "training"

    micro_batch_size: int = flag(1, range=at_least(1), help="samples a rank takes through the model at once")
    global_batch_size: int = flag(
        DERIVED,
        range=at_least(1),
        help="samples of one optimizer step, over all ranks",
        derived="micro_batch_size x data-parallel size",
    )
    rampup_batch_size: tuple[int, ...] = flag(
        (),
        num_values=3,
        metavar="N",
        range=at_least(1),
        help="start, increment and samples: grow the global batch from start by increments, evenly over the samples",
    )
    train_iters: int | None = flag(None, range=at_least(1), help="optimizer steps to train for")
    train_samples: int | None = flag(None, range=at_least(1), help="samples to train for")
    train_tokens: int | None = flag(
        None, range=at_least(1), help="tokens to train for (stops at whichever of the limits comes first)"
    )
    exit_interval: int | None = flag(
        None, range=at_least(1), help="leave, after saving, at each step divisible by this"
    )
    exit_duration_in_mins: float | None = flag(
        None, range=POSITIVE, help="leave, after saving, this many minutes after the start"
    )
    exit_signal_handler: bool = flag(True, help="on SIGTERM finish the step, save and leave with exit code 143")
    kill_switch_file: str | None = flag(None, help="leave, after saving, once this file exists")
    eval_interval: int = flag(1000, range=at_least(1), help="optimizer steps between evaluations on the validation set")
    eval_iters: int = flag(100, range=NOT_NEGATIVE, help="global batches of one evaluation; 0 switches evaluation off")
    skip_train: bool = flag(False, help="only evaluate, on validation and test set, and leave")
    max_nonfinite_steps: int = flag(
        10,
        range=NOT_NEGATIVE,
        help="stop with exit code 17 after this many non-finite steps in a row (loss or gradient); 0: never",
    )
    seed: int = flag(1234, range=NOT_NEGATIVE, help="seed of weights, sample order and dropout")

    precision: str = flag(
        "bf16", choices=("bf16", "fp16", "fp32"), help="dtype of weights and activations in forward and backward"
    )
    accumulate_allreduce_grads_in_fp32: bool = flag(
        True, help="sum the gradients of micro-batches in fp32 (under bf16)"
    )
    loss_scale: float | None = flag(None, range=POSITIVE, help="fp16: constant loss scale instead of a dynamic one")
    initial_loss_scale: float = flag(2.0**16, range=POSITIVE, help="fp16: first dynamic loss scale, a power of two")
    min_loss_scale: float = flag(1.0, range=POSITIVE, help="fp16: lowest dynamic loss scale")
    loss_scale_window: int = flag(
        1000, range=at_least(1), help="fp16: steps without overflow before the loss scale doubles"
    )
    hysteresis: int = flag(2, range=at_least(1), help="fp16: overflows in a row before the loss scale halves")
