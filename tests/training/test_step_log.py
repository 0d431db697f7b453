import json
import math

import pytest

from megatron.training import step_log
from megatron.training.step_log import RecordedSteps, StepLog, StepNumbers, read_steps

NUMBERS = StepNumbers.of(0.1, math.inf)


def numbers(iteration):
    return StepNumbers.of(1 / iteration, 3.0 / iteration)


def record(path, start, last, run="first"):
    log = StepLog(path, start, {"run": run}, warn=pytest.fail)
    for iteration in range(start + 1, last + 1):
        log.write(iteration, numbers(iteration))
    log.close()


def read(path, iteration):
    recorded = read_steps(path, iteration)
    assert all(recorded.steps[step] == numbers(step) for step in recorded.steps)
    return recorded.run.get("run"), list(recorded.steps)


def test_steps_after_an_iteration_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "new" / "steps.jsonl"
    record(path, 0, 5)
    assert read(path, 2) == ("first", [3, 4, 5])
    assert read(path, 5) == (None, [])
    assert float.fromhex(read_steps(path, 2).steps[3].loss) == 1 / 3


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    log = StepLog(tmp_path / "s", 0, {}, warn=pytest.fail)
    log.write(1, StepNumbers.of(math.nan, math.inf))
    log.close()
    assert read_steps(tmp_path / "s", 0).steps[1] == StepNumbers("nan", "inf")


def test_a_process_that_begins_earlier_makes_later_steps_void(tmp_path):
    path = tmp_path / "s"
    record(path, 0, 9)
    record(path, 4, 6, run="second")
    assert read(path, 4) == ("second", [5, 6])
    assert read(path, 2) == ("first", [3, 4]), "steps of one process alone"
    assert read(path, 6) == (None, []), "steps 7 to 9 are of a run that was left"


def test_a_process_that_does_no_step_makes_nothing_void(tmp_path):
    path = tmp_path / "s"
    record(path, 0, 9)
    record(path, 4, 4, run="second")
    assert read(path, 4) == ("first", [5, 6, 7, 8, 9])


@pytest.mark.parametrize("cut", range(2, 60, 7))
def test_a_torn_last_line_is_passed_over_and_written_behind(tmp_path, cut):
    path = tmp_path / "s"
    record(path, 0, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = read(path, 0)[1]
    assert kept == [1, 2]
    record(path, 2, 4, run="second")
    assert read(path, 2) == ("second", [3, 4])


@pytest.mark.parametrize(
    "line",
    ["[]", "{}", "null", '{"start": 1}', '{"iteration": 3}', '{"iteration": 3, "loss": 1, "grad_norm": 2}', "\x00\xff"],
)
def test_what_is_no_record_is_passed_over(tmp_path, line):
    path = tmp_path / "s"
    record(path, 0, 2)
    path.write_text(path.read_text() + line + "\n")
    assert read(path, 0) == ("first", [1, 2])


def test_no_file_holds_no_steps(tmp_path):
    assert read_steps(tmp_path / "none", 3) == RecordedSteps()


def test_a_long_file_is_shortened_to_its_newest_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(step_log, "KEPT_STEPS", 10)
    path = tmp_path / "s"
    record(path, 0, 95)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) <= 21
    assert lines[0] == {"start": 0, "run": {"run": "first"}}
    assert read(path, 90) == ("first", [91, 92, 93, 94, 95])
    assert read(path, 3) == (None, [])


def test_a_failure_to_write_is_told_once(tmp_path):
    (tmp_path / "file").touch()
    told = []
    log = StepLog(tmp_path / "file" / "s", 0, {}, told.append)
    log.write(1, NUMBERS)
    log.write(2, NUMBERS)
    log.close()
    assert len(told) == 1
    assert "--verify-resume" in told[0]
