"""Rules of checkpoints and reports."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.flags import spell
from megatron.config.reporting import ReportingConfig
from megatron.config.training import TrainingConfig

LOADING = (
    "load_tag",
    "load_if_exists",
    "finetune",
    "no_load_optim",
    "no_load_rng",
    "use_checkpoint_opt_param_scheduler",
    "verify_resume",
)


def saving_needs_a_place(checkpoint: CheckpointConfig) -> Iterator[str]:
    """What says when and how much to save needs a folder to save to."""
    for name in ("save_interval", "keep_last", "keep_every", "async_save", "save_hf", "no_save_optim", "no_save_rng"):
        value = getattr(checkpoint, name)
        if value and checkpoint.save is None:
            yield f"{_spoken(name, value)} has no effect without --save."


def keeping_for_ever_needs_a_limit(checkpoint: CheckpointConfig) -> Iterator[str]:
    """Steps are kept for ever only where others are not."""
    if checkpoint.keep_every and not checkpoint.keep_last:
        yield f"--keep-every {checkpoint.keep_every} has no effect without --keep-last, which 0 keeps all."


def loading_needs_a_place(checkpoint: CheckpointConfig) -> Iterator[str]:
    """What asks for something of a checkpoint needs a folder to load from; what merely allows something does not."""
    for name in LOADING:
        value = getattr(checkpoint, name)
        if value and checkpoint.load is None:
            yield f"{_spoken(name, value)} has no effect without --load."


def missing_checkpoint_has_one_meaning(checkpoint: CheckpointConfig) -> Iterator[str]:
    """Where nothing can be loaded the run starts from scratch, or it ends."""
    if checkpoint.load_if_exists and checkpoint.exit_on_missing_checkpoint:
        yield (
            "--load-if-exists starts from scratch when there is no checkpoint, and --exit-on-missing-checkpoint does "
            "not: give one."
        )


def schedule_has_one_source(checkpoint: CheckpointConfig) -> Iterator[str]:
    """The schedule is that of the flags or that of the checkpoint."""
    if not checkpoint.use_checkpoint_opt_param_scheduler:
        return
    if checkpoint.override_opt_param_scheduler:
        yield (
            "--override-opt-param-scheduler follows the schedule of the flags, and "
            "--use-checkpoint-opt-param-scheduler that of the checkpoint: give one."
        )
    if checkpoint.finetune:
        yield (
            "--finetune starts a new schedule, and --use-checkpoint-opt-param-scheduler continues the checkpoint's: "
            "drop one."
        )


def verified_is_what_continues(checkpoint: CheckpointConfig, training: TrainingConfig) -> Iterator[str]:
    """What is replayed to prove a resume is the training that the checkpoint interrupted."""
    others = {
        "--finetune": checkpoint.finetune,
        "--no-load-optim": checkpoint.no_load_optim,
        "--skip-train": training.skip_train,
    }
    for flag, is_given in others.items():
        if checkpoint.verify_resume and is_given:
            yield f"--verify-resume replays the interrupted training, which {flag} does not continue: drop one."


def tensorboard_extras_need_a_folder(reporting: ReportingConfig) -> Iterator[str]:
    """What is written to TensorBoard needs its folder."""
    for name in ("log_timers_to_tensorboard", "log_memory_to_tensorboard"):
        if getattr(reporting, name) and reporting.tensorboard_dir is None:
            yield f"{spell(name)} has no effect without --tensorboard-dir."


def tracker_settings_need_a_tracker(reporting: ReportingConfig) -> Iterator[str]:
    """The name and the folder of a tracker's run need the tracker."""
    if reporting.wandb_exp_name and not (reporting.wandb_project or reporting.mlflow_tracking_uri):
        yield (
            f"--wandb-exp-name {reporting.wandb_exp_name} has no effect without --wandb-project "
            f"(or --mlflow-tracking-uri)."
        )
    if reporting.wandb_save_dir and not reporting.wandb_project:
        yield f"--wandb-save-dir {reporting.wandb_save_dir} has no effect without --wandb-project."


def _spoken(name: str, value: object) -> str:
    return spell(name) if value is True else f"{spell(name)} {value}"
