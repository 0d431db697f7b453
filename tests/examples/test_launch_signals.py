"""A signal to the launch script reaches every process of the job, and the script stays until the last one is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "examples_deepspeed/launch.sh"

INTERPRETER = """#!/usr/bin/env bash
# Answers the launcher's questions, then plays the deepspeed launcher: it dies of a signal, its rank saves first.
[ "$1" != -c ] || { echo 0 && exit; }
(trap 'sleep 0.5; touch saved; exit' TERM USR1; touch started; while :; do sleep 0.05; done) &
wait
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_is_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    script = tmp_path / "train.py"
    script.touch()
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(interpreter)}
    job = subprocess.Popen([LAUNCH, script], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(timeout=30) == 128 + number
    assert (tmp_path / "saved").exists()
