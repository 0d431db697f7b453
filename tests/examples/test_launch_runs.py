"""Each launcher that the launch script knows really trains, two ranks on this machine, and all train alike."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, losses, run

ROOT = Path(__file__).parents[2]
RUN = [*FLAGS, "--mock-data", "--vocab-size", "64", "--train-iters", "3", "--eval-interval", "100"]
RUN += ["--tensor-model-parallel-size", "2", "--progress", "plain"]

SRUN = """#!{python}
# Starts the tasks of a step as srun does: with SLURM's variables, which are all that they are told.
import os, subprocess, sys
words = sys.argv[1:]
tasks = int(words[words.index("--ntasks-per-node") + 1])
command = words[words.index("{python}") :]
step = dict(SLURM_STEP_ID="0", SLURM_STEP_NODELIST="localhost")
step |= dict.fromkeys(("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), str(tasks))
ranks = [
    subprocess.Popen(command, env=os.environ | step | dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
    for rank in range(tasks)
]
sys.exit(max(rank.wait() for rank in ranks))
"""


def launch(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "NUM_GPUS": "2",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    words = [
        *command,
        str(ROOT / "examples_deepspeed/launch.sh"),
        "pretrain_gpt.py",
        *RUN,
        "--save",
        str(folder / "run"),
    ]
    return subprocess.run(
        words, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    run_on_ranks(2, run, [*RUN, "--save", str(folder)], initialize=False, deepspeed=True)
    return losses(folder)


def check(done: subprocess.CompletedProcess[str], folder: Path, expected: dict[int, str]) -> None:
    assert done.returncode == 0, done.stderr
    assert losses(folder / "run") == expected
    assert len(expected) == 3
    table = [line.split() for line in done.stdout.splitlines() if line.endswith(("tensor", "     0", "     1"))]
    assert [row[0] for row in table] == ["rank", "0", "1"]


def test_torchrun_trains(tmp_path, expected):
    done = launch(tmp_path, LAUNCHER="torchrun")
    assert "starting:" in done.stderr
    check(done, tmp_path, expected)


def test_tasks_of_srun_train(tmp_path, expected):
    (tmp_path / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    done = launch(tmp_path, **job)
    assert "starting: srun --nodes 1 --ntasks-per-node 2" in done.stderr
    check(done, tmp_path, expected)


def open_mpi() -> bool:
    if shutil.which("mpirun") is None:
        return False
    return "Open MPI" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout


@pytest.mark.skipif(not open_mpi(), reason="there is no mpirun of Open MPI on PATH")
@pytest.mark.parametrize("command", [[], ["mpirun", "-np", "2"]], ids=["the script starts mpirun", "mpirun the script"])
def test_ranks_of_mpirun_train(tmp_path, expected, command):
    port = {"MASTER_PORT": str(20_000 + os.getpid() % 10_000)} if command else {"LAUNCHER": "mpirun"}
    check(launch(tmp_path, *command, **port), tmp_path, expected)


@pytest.mark.parametrize(("code", "queued_again"), [(143, True), (0, False), (1, False)])
def test_the_slurm_job_is_queued_again_when_it_was_asked_to_stop(tmp_path, code, queued_again):
    for name, text in (("train.sh", f'echo "$@"; exit {code}'), ("scontrol", f'echo "$@" >{tmp_path}/scontrol.log')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    script = ["bash", str(ROOT / "examples_deepspeed/slurm/pretrain.sbatch"), "./train.sh", "--lr", "1"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (code, "--lr 1\n")
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else None) == ("requeue 7\n" if queued_again else None)
