import io
import json
import math
import sys
import threading
import types

import pytest

from megatron.checkpoint.store import Saved
from megatron.config.errors import UserError
from megatron.config.reporting import ReportingConfig
from megatron.training.progress import LiveConsole, PlainConsole, build_console, train_line
from megatron.training.report import Background, MetricsFile, Reporter, build_reporter

RECORD = {
    "iteration": 20,
    "consumed_samples": 160,
    "consumed_tokens": 2560,
    "elapsed_ms_per_step": 12.5,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "global_batch_size": 8,
    "lm_loss": 3.25,
    "grad_norm": 1.5,
    "loss_scale": 1.0,
    "skipped_steps": 1,
    "nonfinite_steps": 2,
    "tokens_per_second": 10240.0,
    "model_tflops": 453.21,
    "hardware_tflops": 500.0,
    "mfu": 0.458,
    "memory_gib": 1.25,
    "eta_seconds": 3661.0,
    "timers_ms": {"data": 0.5, "agreement": 0.125, "overhead": 0.75},
}
EVALUATION = {"split": "validation", "iteration": 20, "lm_loss": 3.0, "perplexity": 20.1, "tokens": 99}


class RecordingTracker:
    def __init__(self):
        self.logged = []
        self.closed = False

    def log(self, values, iteration):
        self.logged.append((iteration, values))

    def close(self):
        self.closed = True


class FailingTracker(RecordingTracker):
    def log(self, values, iteration):
        raise ConnectionError("the server is gone")


def report(opening, reports=3):
    """Report a few times to one tracker; returns what was printed."""
    stream = io.StringIO()
    console = PlainConsole(100, stream)
    tracker = Background("the tracker", opening, lambda text: console.say(f"WARNING: {text}"))
    reporter = Reporter(console, None, {"the tracker": tracker})
    for _ in range(reports):
        reporter.train(RECORD)
    reporter.evaluation(EVALUATION)
    tracker.close(seconds=0.3)
    return stream.getvalue()


def test_train_line_has_megatrons_names():
    line = train_line(RECORD, 100)
    for part in (
        "iteration       20/     100 |",
        "consumed samples:          160 |",
        "consumed tokens:",
        "elapsed time per iteration (ms): 12.5 |",
        "host overhead (ms): 0.75, data 0.50, agreement 0.12 |",
        "learning rate: 1.000000E-03 |",
        "global batch size:     8 |",
        "lm loss: 3.250000E+00 |",
        "grad norm: 1.500 |",
        "number of skipped iterations:   1 |",
        "number of nan iterations:   2 |",
        "tokens/s: 10240 |",
        "TFLOP/s/GPU: 453.2 model, 500 hardware |",
        "MFU: 45.8% |",
        "memory: 1.25 GiB |",
        "ETA: 1:01:01 |",
    ):
        assert part in line
    assert "\n" not in line


def test_train_line_without_a_known_end_or_peak():
    line = train_line(RECORD | {"mfu": None, "eta_seconds": None, "lm_loss": math.nan}, None)
    assert "MFU: unknown" in line
    assert "ETA: unknown" in line
    assert "lm loss: nan" in line.lower()


def test_console_is_plain_without_a_terminal(capsys):
    assert isinstance(build_console("auto", 100), PlainConsole)
    assert isinstance(build_console("plain", 100), PlainConsole)


def test_live_console_keeps_sentences_above_the_line(capsys):
    console = build_console("live", 100)
    assert isinstance(console, LiveConsole)
    console.train(RECORD)
    console.evaluation(EVALUATION)
    console.say(" saved [here]")
    console.close()
    printed = capsys.readouterr().out
    assert "saved [here]" in printed
    assert "lm loss value: 3.000000E+00" in printed


def test_tracker_gets_numbers_by_megatrons_names():
    tracker = RecordingTracker()
    assert "WARNING" not in report(lambda: tracker, reports=1)
    assert tracker.closed
    (iteration, values), (_, evaluation) = tracker.logged
    assert iteration == 20
    assert values["lm loss"] == 3.25
    assert values["learning-rate"] == 1e-3
    assert evaluation == {"lm loss validation": 3.0, "lm loss validation ppl": 20.1}


@pytest.mark.parametrize("opening", [FailingTracker, lambda: 1 / 0])
def test_failing_tracker_costs_one_warning(opening):
    printed = report(opening)
    assert printed.count("WARNING") == 1
    assert "the tracker gets no more reports" in printed
    assert printed.count("lm loss: 3.25") == 3


def test_hanging_tracker_delays_nothing():
    released = threading.Event()
    printed = report(lambda: released.wait(60))
    released.set()
    assert printed.count("lm loss: 3.25") == 3
    assert printed.count("WARNING") == 1
    assert "did not finish" in printed


def test_tracker_that_does_not_keep_up_costs_one_warning():
    said, released = [], threading.Event()
    tracker = Background("slow", lambda: released.wait(60), said.append, size=2)
    for _ in range(9):
        tracker.log({}, 1)
    released.set()
    assert len(said) == 1
    assert "does not keep up" in said[0]


def test_metrics_read_back_bit_for_bit(tmp_path):
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    loss = 0.1 + 2**-50
    file.write({"lm_loss": loss, "grad_norm": math.inf, "mfu": None, "kind": "train"})
    file.close()
    (record,) = map(json.loads, (tmp_path / "new" / "metrics.jsonl").read_text().splitlines())
    assert record["lm_loss"].hex() == loss.hex()
    assert record["grad_norm"] is record["mfu"] is None


def test_metrics_after_a_cut_line_start_on_a_new_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    file = MetricsFile(path)
    file.write({"iteration": 2})
    file.close()
    assert path.read_text().splitlines() == ['{"iteration": 1}', '{"iterat', '{"iteration": 2}']


def test_only_rank_0_reports(tmp_path, capsys):
    reporter = build_reporter(ReportingConfig(), is_first=False, save=str(tmp_path), total_iterations=1, config={})
    reporter.start({})
    reporter.train(RECORD)
    reporter.evaluation(EVALUATION)
    reporter.say("a sentence")
    reporter.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_unwritable_metrics_file_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").touch()
    config = ReportingConfig(metrics_file=str(tmp_path / "file" / "metrics.jsonl"))
    reporter = build_reporter(config, is_first=True, save=None, total_iterations=1, config={})
    reporter.train(RECORD)
    reporter.close()
    assert capsys.readouterr().out.count("WARNING") == 1


def test_missing_tracker_library_is_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flag, value, extra in (("wandb_project", "p", "wandb"), ("mlflow_tracking_uri", "m", "mlflow")):
        with pytest.raises(UserError, match=rf"pip install megatron-deepspeed\[{extra}\]"):
            build_reporter(ReportingConfig(**{flag: value}), is_first=True, save=None, total_iterations=1, config={})


def test_tensorboard_gets_timers_and_memory_when_asked(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = ReportingConfig(
        tensorboard_dir=str(tmp_path), log_timers_to_tensorboard=True, log_memory_to_tensorboard=True
    )
    reporter = build_reporter(config, is_first=True, save=None, total_iterations=1, config={})
    reporter.train(RECORD)
    reporter.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"lm loss", "grad-norm", "timers/data", "memory (GiB)"} <= set(events.Tags()["scalars"])
    assert events.Scalars("lm loss")[0].value == 3.25


def test_wandb_and_mlflow_are_driven_through_their_interfaces(monkeypatch):
    calls = []

    def note(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs))

    run = types.SimpleNamespace(log=note("log"), finish=note("finish"))
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **kwargs: calls.append(("init", (), kwargs)) or run
    mlflow = types.ModuleType("mlflow")
    for name in ("set_tracking_uri", "set_experiment", "start_run", "log_dict", "log_metrics", "end_run"):
        setattr(mlflow, name, note(name))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config = ReportingConfig(wandb_project="p", wandb_exp_name="e", mlflow_tracking_uri="folder")
    reporter = build_reporter(config, is_first=True, save=None, total_iterations=1, config={"model": {}})
    reporter.train(RECORD)
    reporter.close()
    names = [name for name, _, _ in calls]
    assert {"init", "log", "finish", "start_run", "log_dict", "log_metrics", "end_run"} <= set(names)
    assert next(kwargs for name, _, kwargs in calls if name == "init")["project"] == "p"
    assert next(args for name, args, _ in calls if name == "log_metrics")[0]["lm loss"] == 3.25


def test_a_save_is_told_with_size_speed_and_what_the_training_waited(tmp_path, capsys):
    saved = Saved(path=tmp_path / "step_0000020", iteration=20, num_bytes=3 * 10**9, seconds=2.0, stalled=0.25)
    reporter = build_reporter(
        ReportingConfig(progress="plain"), is_first=True, save=str(tmp_path), total_iterations=None, config={}
    )
    reporter.saved(saved)
    reporter.close()
    assert f" saved {saved.path}: 3.000 GB in 2.00 s (1.50 GB/s), the training waited 250 ms" in capsys.readouterr().out
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    time = record.pop("time")
    assert time > 0
    assert record == {"kind": "save", "iteration": 20, "bytes": 3 * 10**9, "seconds": 2.0, "waited_ms": 250.0}
