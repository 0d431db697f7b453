"""Where a run's numbers go besides the terminal: metrics.jsonl, TensorBoard, Weights & Biases, MLflow.

Only rank 0 reports. Trackers work in their own threads: one that fails or hangs costs a warning, never a step.
"""

from __future__ import annotations

import importlib.util
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.checkpoint.store import Saved
from megatron.config.errors import UserError
from megatron.config.reporting import ReportingConfig
from megatron.training.progress import Console, Record, build_console

SCALARS = {
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "weight_decay": "weight-decay",
    "global_batch_size": "batch-size",
    "grad_norm": "grad-norm",
    "params_norm": "params-norm",
    "loss_scale": "loss-scale",
    "skipped_steps": "skipped-iterations",
    "nonfinite_steps": "nan-iterations",
    "elapsed_ms_per_step": "iteration-time",
    "tokens_per_second": "tokens per second",
    "model_tflops": "model TFLOPs per GPU",
    "hardware_tflops": "hardware TFLOPs per GPU",
    "mfu": "MFU",
    "consumed_samples": "consumed-samples",
    "consumed_tokens": "consumed-tokens",
}
"""Names of the numbers at the trackers: those of Megatron-LM where it has one."""

TENSORBOARD = "TensorBoard"
CLOSING_SECONDS = 20.0


class Tracker(Protocol):
    """Something that takes named numbers of an iteration."""

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Take the numbers."""

    def close(self) -> None:
        """Write out what is held."""


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, directory: str, queue_size: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory, max_queue=queue_size, flush_secs=30)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Write the numbers as scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases."""

    def __init__(self, reporting: ReportingConfig, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=reporting.wandb_project,
            name=reporting.wandb_exp_name,
            dir=reporting.wandb_save_dir,
            config=dict(config),
        )

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Send the numbers."""
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run at an MLflow server or folder."""

    def __init__(self, reporting: ReportingConfig, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_tracking_uri(reporting.mlflow_tracking_uri)
        mlflow.set_experiment(reporting.mlflow_experiment)
        mlflow.start_run(run_name=reporting.wandb_exp_name)
        mlflow.log_dict(dict(config), "config.json")

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Send the numbers."""
        self._mlflow.log_metrics(dict(values), step=iteration)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class Background:
    """Opens and feeds a tracker in a thread of its own; the first failure, or a full queue, is told once."""

    def __init__(
        self, name: str, opening: Callable[[], Tracker], warn: Callable[[str], None], size: int = 1000
    ) -> None:
        self._name = name
        self._opening = opening
        self._warn = warn
        self._failed = False
        self._queue: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._work, name=f"report to {name}", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Hand the numbers over; returns at once."""
        if not self._failed:
            try:
                self._queue.put_nowait((values, iteration))
            except queue.Full:
                self._fail("it does not keep up")

    def close(self, seconds: float = CLOSING_SECONDS) -> None:
        """Give the tracker some seconds to write out what is left."""
        if not self._failed:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                return
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._fail(f"it did not finish within {seconds:g} s")

    def _work(self) -> None:
        try:
            tracker = self._opening()
            while (item := self._queue.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except Exception as error:  # whatever a tracker does, the training goes on
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        self._failed = True
        self._warn(f"{self._name} gets no more reports of this run: {reason}")


class MetricsFile:
    """The JSONL file: one object a report, appended. Floats are written so that they read back bit for bit.

    After a resume the iterations that were lost are written again: for each iteration the last line counts.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - open for the whole run
        self._end_cut_line()

    def write(self, record: Record) -> None:
        """Append the record; a value that is not finite becomes null."""
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _end_cut_line(self) -> None:
        """Start on a new line after a process that was killed while it wrote one."""
        if self._file.seek(0, 2):
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")


@dataclass(frozen=True, kw_only=True)
class TensorBoardOptions:
    """What TensorBoard alone gets, and at every how many reports."""

    every: int = 1
    timers: bool = False
    memory: bool = False

    def extras(self, record: Record) -> dict[str, float]:
        """Pick the timers (ms a step) and the memory (GiB) out of a report."""
        timers = {f"timers/{name}": value for name, value in record["timers_ms"].items()} if self.timers else {}
        return timers | ({"memory (GiB)": record["memory_gib"]} if self.memory else {})


class Reporter:
    """Tells the terminal, the metrics file and the trackers; tells nobody without a console (ranks other than 0)."""

    def __init__(
        self,
        console: Console | None,
        metrics_file: MetricsFile | None = None,
        trackers: Mapping[str, Background] | None = None,
        tensorboard: TensorBoardOptions | None = None,
    ) -> None:
        self._console = console
        self._metrics_file = metrics_file
        self._trackers = trackers or {}
        self._tensorboard = tensorboard or TensorBoardOptions()
        self._reports = 0

    def start(self, record: Record) -> None:
        """Note in the metrics file that a process starts, and where."""
        self._write({"kind": "start", **record})

    def train(self, record: Record) -> None:
        """Tell of the steps of one interval."""
        if self._console is None:
            return
        self._console.train(record)
        self._write({"kind": "train", **record})
        values = {name: record[key] for key, name in SCALARS.items() if _is_number(record.get(key))}
        for name, tracker in self._trackers.items():
            if name != TENSORBOARD:
                tracker.log(values, record["iteration"])
            elif self._reports % self._tensorboard.every == 0:
                tracker.log(values | self._tensorboard.extras(record), record["iteration"])
        self._reports += 1

    def evaluation(self, record: Record) -> None:
        """Tell of one evaluation."""
        if self._console is None:
            return
        self._console.evaluation(record)
        self._write({"kind": "evaluation", **record})
        names = {"lm_loss": f"lm loss {record['split']}", "perplexity": f"lm loss {record['split']} ppl"}
        values = {name: record[key] for key, name in names.items() if _is_number(record[key])}
        for tracker in self._trackers.values():
            tracker.log(values, record["iteration"])

    def saved(self, saved: Saved) -> None:
        """Tell of a checkpoint that is complete: its size, how fast it was written, how long the training waited."""
        gigabytes, waited_ms = saved.num_bytes / 1e9, 1e3 * saved.stalled
        speed = gigabytes / max(saved.seconds, 1e-9)
        self.say(
            f" saved {saved.path}: {gigabytes:.3f} GB in {saved.seconds:.2f} s ({speed:.2f} GB/s), "
            f"the training waited {waited_ms:.0f} ms"
        )
        self._write(
            {
                "kind": "save",
                "iteration": saved.iteration,
                "bytes": saved.num_bytes,
                "seconds": saved.seconds,
                "waited_ms": waited_ms,
            }
        )

    def say(self, text: str) -> None:
        """Print a sentence."""
        if self._console is not None:
            self._console.say(text)

    def close(self) -> None:
        """Let the trackers finish and leave the terminal as it was."""
        for tracker in self._trackers.values():
            tracker.close()
        if self._metrics_file is not None:
            self._metrics_file.close()
        if self._console is not None:
            self._console.close()

    def _write(self, record: Record) -> None:
        if self._metrics_file is None:
            return
        try:
            self._metrics_file.write({**record, "time": time.time()})
        except OSError as error:
            self._metrics_file = None
            self.say(f"WARNING: the metrics file gets no more reports of this run: {error}")


def build_reporter(
    reporting: ReportingConfig,
    *,
    is_first: bool,
    save: str | None,
    total_iterations: int | None,
    config: Mapping[str, Any],
) -> Reporter:
    """Make the reporter of this rank.

    Raises:
        UserError: a tracker was asked for whose library is not installed (on every rank alike).
    """
    _require(reporting.wandb_project, "wandb", "--wandb-project")
    _require(reporting.mlflow_tracking_uri, "mlflow", "--mlflow-tracking-uri")
    if not is_first:
        return Reporter(None)
    console = build_console(reporting.progress, total_iterations)
    openings: dict[str, Callable[[], Tracker]] = {}
    if reporting.tensorboard_dir is not None:
        directory, size = reporting.tensorboard_dir, reporting.tensorboard_queue_size
        openings[TENSORBOARD] = lambda: TensorBoard(directory, size)
    if reporting.wandb_project is not None:
        openings["Weights & Biases"] = lambda: WeightsAndBiases(reporting, config)
    if reporting.mlflow_tracking_uri is not None:
        openings["MLflow"] = lambda: MLflow(reporting, config)

    def warn(text: str) -> None:
        console.say(f"WARNING: {text}")

    return Reporter(
        console,
        _open_metrics_file(reporting.metrics_file, save, warn),
        {name: Background(name, opening, warn) for name, opening in openings.items()},
        TensorBoardOptions(
            every=reporting.tensorboard_log_interval,
            timers=reporting.log_timers_to_tensorboard,
            memory=reporting.log_memory_to_tensorboard,
        ),
    )


def _open_metrics_file(path: str | None, save: str | None, warn: Callable[[str], None]) -> MetricsFile | None:
    if path is None and save is None:
        return None
    try:
        return MetricsFile(Path(path) if path is not None else Path(str(save)) / "metrics.jsonl")
    except OSError as error:
        warn(f"there is no metrics file of this run: {error}")
        return None


def _require(wanted: object, library: str, flag: str) -> None:
    if wanted is not None and importlib.util.find_spec(library) is None:
        raise UserError(
            f"{flag} {wanted} needs {library}, which is not installed: pip install megatron-deepspeed[{library}]"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
