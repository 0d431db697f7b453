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
    save_hf: bool = flag(
        False,
        help="write each checkpoint once more as a model of Hugging Face, in the folder hf of --save, while the "
        "training goes on",
    )
    no_save_optim: bool = flag(
        False, help="leave the optimizer's state out of checkpoints: they then load with --no-load-optim or --finetune"
    )
    no_save_rng: bool = flag(False, help="leave the random streams out of checkpoints")

    load: str | None = flag(None, metavar="DIR", help="folder whose newest complete checkpoint is resumed")
    load_tag: str | None = flag(
        None, metavar="TAG", help="checkpoint of --load to take by its name, as step_0000500, instead of the newest"
    )
    load_if_exists: bool = flag(False, help="start from scratch when --load holds no checkpoint, instead of an error")
    exit_on_missing_checkpoint: bool = flag(
        False, help="what holds without --load-if-exists: it is an error when --load holds no checkpoint"
    )
    finetune: bool = flag(
        False,
        help="take the weights of --load and nothing else: a new training starts at iteration 0, with its own data, "
        "batch, schedule, optimizer state and random streams",
    )
    no_load_optim: bool = flag(
        False, help="start with fresh optimizer state (and loss scale); iteration, schedule and data position continue"
    )
    no_load_rng: bool = flag(
        False, help="start random streams that follow from seed, iteration and rank, instead of the checkpoint's"
    )
    override_opt_param_scheduler: bool = flag(
        False, help="follow the schedule of these flags where the checkpoint's was another, which is else an error"
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False, help="follow the checkpoint's schedule of learning rate and weight decay, whatever these flags say"
    )
    override_data: bool = flag(
        False,
        help="go on with other data, tokenizer, --seq-length or --seed than the checkpoint's, which is else an error: "
        "from their first sample on",
    )
    verify_resume: bool = flag(
        False,
        help="prove the resume: weights and optimizer state against the checkpoint's, then the loss of the next "
        "samples and each step that the earlier run recorded after it; a difference ends the run",
    )
