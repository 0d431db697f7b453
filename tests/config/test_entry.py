from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.command_lines import LEGAL

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}

WATCH = """
import atexit, runpy, sys
sys.argv = ["pretrain_gpt.py", *sys.argv[1:]]
heavy = {"torch", "numpy", "deepspeed", "transformers"}
atexit.register(lambda: print("loaded:", sorted(heavy & set(sys.modules)), file=sys.stderr))
runpy.run_path("pretrain_gpt.py", run_name="__main__")
"""


def run(*words: str, program: tuple[str, ...] = ("pretrain_gpt.py",)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), ([*LEGAL, "--print-config"], 0), (["--num-laers", "3"], 2), ([*LEGAL, "--zero-stage", "0"], 2)],
)
def test_help_and_errors_do_without_torch(words: list[str], code: int) -> None:
    result = run(*words, program=("-c", WATCH))
    assert result.returncode == code
    assert "loaded: []" in result.stderr


def test_help_answers_in_a_moment() -> None:
    def seconds() -> float:  # of processor time: wall time but for what else the machine does
        start = os.times()
        assert run("--help").returncode == 0
        end = os.times()
        return end.children_user + end.children_system - start.children_user - start.children_system

    seconds()  # writes the byte code
    assert statistics.median(seconds() for _ in range(5)) < 0.3


def test_user_error_is_printed_once_without_a_traceback() -> None:
    result = run(*LEGAL, "--attention-dropout", "2")
    assert result.returncode == 2
    assert result.stderr == "--attention-dropout 2.0 must be in [0, 1).\n"


def test_entry_script_is_short() -> None:
    assert len((ROOT / "pretrain_gpt.py").read_text().splitlines()) <= 35
