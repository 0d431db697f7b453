"""A signal to the launch script reaches the ranks and not their launcher, and the script stays until they are gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "examples_deepspeed/launch.sh"

LAUNCHER = """#!/usr/bin/env bash
# Answers the script's questions, then plays a launcher: tells of each signal, and ends as its one rank does.
[ "$1" != -c ] || { echo 0 && exit; }
trap 'touch launcher-was-hit' TERM USR1
LOCAL_RANK=0 bash -c 'trap "sleep 0.5; touch saved; exit 143" TERM USR1; touch started; while :; do sleep 0.05; done' &
wait $!
"""

RANK = """
import os, pathlib, signal, sys, time

def save(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
pathlib.Path("started").touch()
time.sleep(60)
"""


def signalled(folder: Path, number: signal.Signals, **variables: str) -> int:
    """Start the script, send it a signal once its rank runs, and return its exit code."""
    script = folder / "train.py"
    script.write_text(RANK)
    environment = {"PATH": os.environ["PATH"], "DS_ACCELERATOR": "cpu", "NUM_GPUS": "1"} | variables
    job = subprocess.Popen([LAUNCH, script], cwd=folder, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(number)
        return job.wait(timeout=30)
    finally:
        job.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_ranks_save_while_their_launcher_waits(tmp_path, number):
    interpreter = tmp_path / "python"
    interpreter.write_text(LAUNCHER)
    interpreter.chmod(0o755)
    assert signalled(tmp_path, number, PYTHON=str(interpreter)) == 143
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "launcher-was-hit").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_of_torchrun_save_and_the_script_tells_it(tmp_path, number):
    assert signalled(tmp_path, number, LAUNCHER="torchrun", PYTHON=sys.executable) == 143
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun on PATH")
def test_ranks_of_mpirun_save_and_the_script_tells_it(tmp_path):
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert signalled(tmp_path, signal.SIGTERM, LAUNCHER="mpirun", PYTHON=sys.executable, **root) == 143
    assert (tmp_path / "saved").exists()
