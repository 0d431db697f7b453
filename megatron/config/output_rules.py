"""Rules of checkpoints and reports."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.flags import spell
from megatron.config.reporting import ReportingConfig


def saving_needs_a_place(checkpoint: CheckpointConfig) -> Iterator[str]:
    """What says when and how much to save needs a folder to save to."""
    for name in ("save_interval", "keep_last", "keep_every", "async_save"):
        value = getattr(checkpoint, name)
        if value and checkpoint.save is None:
            yield f"{spell(name)}{'' if value is True else f' {value}'} has no effect without --save."


def keeping_for_ever_needs_a_limit(checkpoint: CheckpointConfig) -> Iterator[str]:
    """Steps are kept for ever only where others are not."""
    if checkpoint.keep_every and not checkpoint.keep_last:
        yield f"--keep-every {checkpoint.keep_every} has no effect without --keep-last, which 0 keeps all."


def loading_needs_a_place(checkpoint: CheckpointConfig) -> Iterator[str]:
    """What says how to load needs a folder to load from."""
    for name in ("load_if_exists", "no_load_rng"):
        if getattr(checkpoint, name) and checkpoint.load is None:
            yield f"{spell(name)} has no effect without --load."


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
