import json
import sys

import pytest

from tools import plot_run


def record(iteration, loss, kind="train", **more):
    known = {"consumed_tokens": 10 * iteration, "nonfinite_steps": 0, "learning_rate": 0.1, "grad_norm": 1.0}
    return {"kind": kind, "iteration": iteration, "lm_loss": loss, "tokens_per_second": 5.0, **known, **more}


def write_run(folder, *records):
    folder.mkdir()
    lines = [json.dumps(one) for one in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], '{"kind": "tra', lines[-1]]) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    valid = {"kind": "evaluation", "split": "validation"}
    reports = [record(1, 4.0), record(2, 3.5), record(2, 3.0), record(3, None), record(2, 3.25, **valid)]
    return write_run(tmp_path / "run", {"kind": "start", "iteration": 0}, *reports)


def test_later_report_of_an_iteration_counts(run):
    read = plot_run.read_run(run)
    assert read.curve(read.train, "lm_loss") == ([1, 2], [4.0, 3.0])
    assert read.curve(read.validation, "lm_loss") == ([2], [3.25])
    assert read.broken_lines == 1


def test_summary_and_picture_of_two_runs(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", record(1, 2.0))
    picture = tmp_path / "curves.png"
    assert plot_run.main([str(run), str(other / "metrics.jsonl"), "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "4.0000" in printed
    assert "3.2500" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_missing_file_and_missing_matplotlib_are_sentences(run, tmp_path, capsys, monkeypatch):
    assert plot_run.main([str(tmp_path / "nowhere.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_run.main([str(run), "--output", str(tmp_path / "x.png")]) == 2
    assert "pip install megatron-deepspeed[plot]" in capsys.readouterr().err
