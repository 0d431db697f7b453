"""What a run tells: terminal, log, TensorBoard, metrics file, trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import POSITIVE, at_least, flag


@dataclass(frozen=True, kw_only=True)
class ReportingConfig:
    """Reporting. A tracker that fails is reported once and never stops the training."""

    title: ClassVar[str] = "reporting"

    log_interval: int = flag(10, range=at_least(1), help="optimizer steps between reports")
    progress: str = flag(
        "auto", choices=("auto", "live", "plain"), help="a live line on a terminal, or plain lines; auto looks"
    )
    metrics_file: str | None = flag(
        None, metavar="FILE", help="JSONL file of every report (default: metrics.jsonl in --save)"
    )
    tensorboard_dir: str | None = flag(None, metavar="DIR", help="folder for TensorBoard event files")
    tensorboard_log_interval: int = flag(1, range=at_least(1), help="reports between TensorBoard entries")
    tensorboard_queue_size: int = flag(1000, range=at_least(1), help="TensorBoard entries held before they are written")
    log_timers_to_tensorboard: bool = flag(False, help="also write the timers to TensorBoard")
    log_memory_to_tensorboard: bool = flag(False, help="also write the device's memory use to TensorBoard")
    log_params_norm: bool = flag(False, help="also report the norm of all weights (one more pass over them)")
    wandb_project: str | None = flag(None, help="Weights & Biases project (needs the wandb extra)")
    wandb_exp_name: str | None = flag(None, help="name of the run at the tracker")
    wandb_save_dir: str | None = flag(None, metavar="DIR", help="folder for W&B's local files")
    mlflow_tracking_uri: str | None = flag(None, help="MLflow server or folder (needs the mlflow extra)")
    mlflow_experiment: str = flag("megatron", help="MLflow experiment")
    peak_tflops: float | None = flag(
        None,
        range=POSITIVE,
        help="peak TFLOP/s of one GPU in the training dtype, for MFU (default: from a table by GPU name)",
    )
