"""A process finds its rank under any launcher, and says what is wrong with its environment."""

import logging
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron.engine import launch
from megatron.engine.launch import LaunchError, RankEnvironment, quiet_stdout, read_environment
from tests.ranks import run_on_ranks

SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "12345"}
BARE_SRUN = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1"}


def at(address, port):
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"} | at("h", 7), (3, 1, 4, "h", 7)),
        ({"RANK": "0", "WORLD_SIZE": "1"} | at("h", 7), (0, 0, 1, "h", 7)),
        (SRUN | {"SLURM_JOB_NODELIST": "gpu[007-009],x"}, (5, 1, 8, "gpu007", 22345)),
        (SRUN | {"SLURM_JOB_NODELIST": "a,b"} | at("h", 7), (5, 1, 8, "h", 7)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "b1"}, (5, 1, 6, "b1", 22345)),
        (BARE_SRUN | {"SLURM_NODELIST": "n[3,5]"}, (0, 0, 2, "n3", 29500)),
        (SRUN | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"} | at("h", 7), (1, 1, 2, "h", 7)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 1, 2, "127.0.0.1", 29500)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "PALS_LOCAL_RANKID": "0"} | at("h", 7), (1, 0, 2, "h", 7)),
        (HYDRA | {"MPI_LOCALNRANKS": "3"}, (2, 2, 3, "127.0.0.1", 29500)),
        (MVAPICH | {"MV2_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 1, 2, "127.0.0.1", 29500)),
        # mpirun in a SLURM job: its daemons are tasks of srun, on the hosts other than the first
        (SRUN | OPEN_MPI | {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_STEP_NODELIST": "a2"}, (1, 1, 2, "a1", 22345)),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8", "SLURM_JOB_NODELIST": "a[1-2]"}, (5, 1, 8, "a1", 22345)),
    ],
)
def test_each_launcher_is_understood(variables, expected):
    environment = read_environment(variables)
    found = (
        environment.rank,
        environment.local_rank,
        environment.world_size,
        environment.master_address,
        environment.master_port,
    )
    assert found == expected


def test_without_a_launcher_the_run_is_one_process_on_a_free_port():
    environment = read_environment({})
    assert (environment.rank, environment.local_rank, environment.world_size) == (0, 0, 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", environment.master_port))


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"WORLD_SIZE": "4"}, ("WORLD_SIZE=4", "RANK is not", "torchrun")),
        ({"RANK": "0"}, ("RANK=0", "WORLD_SIZE is not")),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"} | at("h", 7), ("RANK=4", "WORLD_SIZE=4")),
        ({"RANK": "1", "WORLD_SIZE": "4"} | at("h", 7), ("LOCAL_RANK is not set",)),
        ({"RANK": "x", "WORLD_SIZE": "4"}, ("RANK='x'", "whole number")),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ("MASTER_ADDR is not set",)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("MASTER_ADDR is not set", "mpirun -x")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, ("SLURM_NTASKS=8", "srun")),
        ({"PMIX_RANK": "1"}, ("PMIX_RANK=1", "mpirun or srun")),
    ],
)
def test_a_wrong_environment_is_named_with_the_way_out(variables, parts):
    with pytest.raises(LaunchError) as caught:
        read_environment(variables)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_is_printed_becomes_debug_records(capsys, caplog):
    with caplog.at_level(logging.DEBUG, "megatron.engine.launch"), quiet_stdout():
        print("noise")
    assert capsys.readouterr().out == ""
    assert caplog.messages == ["deepspeed: noise"]


def start_and_stop(times):
    import torch
    import torch.distributed as dist

    sums = []
    for _ in range(times):
        device = launch.start(launch.read_environment(), timedelta(seconds=60))
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        sums.append((str(device), dist.get_backend(), total.item()))
        launch.stop()
    launch.stop()
    return sums, dist.is_initialized()


@pytest.mark.parametrize(("size", "times", "total"), [(2, 1, 3.0), (1, 2, 1.0)])
def test_start_joins_the_others_and_stop_leaves_so_that_it_can_start_again(size, times, total):
    expected = [("cpu", "gloo", total)] * times, False
    assert run_on_ranks(size, start_and_stop, times, initialize=False, deepspeed=True) == [expected] * size


def start_as_told_by(launcher):
    """Start with the variables of another launcher instead of torchrun's, which are all that a rank has then."""
    import torch
    import torch.distributed as dist

    told = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    rank = told["RANK"]
    os.environ.update(
        {
            "mpirun": {
                "OMPI_COMM_WORLD_RANK": rank,
                "OMPI_COMM_WORLD_LOCAL_RANK": rank,
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            "mpiexec": {"PMI_RANK": rank, "MPI_LOCALRANKID": rank, "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"},
            "srun": {
                "SLURM_PROCID": rank,
                "SLURM_LOCALID": rank,
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
            },
        }[launcher]
    )
    launch.start(launch.read_environment(), timedelta(seconds=60))
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    launch.stop()
    return total.item()


@pytest.mark.parametrize("launcher", ["mpirun", "mpiexec", "srun"])
def test_ranks_of_another_launcher_meet_by_its_variables_alone(launcher):
    assert run_on_ranks(2, start_as_told_by, launcher, initialize=False, deepspeed=True) == [3.0, 3.0]


def find_nobody():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = RankEnvironment(
            rank=0, local_rank=0, world_size=2, master_address="127.0.0.1", master_port=port, launcher="x"
        )
        with pytest.raises(LaunchError) as caught:
            launch.start(environment, timedelta(seconds=2))
    return str(caught.value)


def test_a_taken_port_is_an_error_that_names_address_and_rank():
    (message,) = run_on_ranks(1, find_nobody, initialize=False, deepspeed=True)
    assert "rank 0 of 2" in message
    assert "127.0.0.1:" in message


def warn_of_lock(folder):
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    records = []
    launch.log.addHandler(handler := logging.Handler())
    handler.emit = records.append
    launch.start(launch.read_environment(), timedelta(seconds=60))
    return [record.getMessage() for record in records if record.levelno == logging.WARNING]


def test_the_lock_of_a_killed_build_is_named(tmp_path):
    for name, age in (("old_op", 3600), ("new_op", 1)):
        lock = tmp_path / name / "lock"
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    ((message,),) = run_on_ranks(1, warn_of_lock, str(tmp_path), initialize=False, deepspeed=True)
    assert str(tmp_path / "old_op" / "lock") in message


@pytest.mark.parametrize(
    ("named", "kept"), [("8.0 9.0 10.0a+PTX", "9.0"), ("9.0a", "9.0"), ("8.0;9.0+PTX", "8.0;9.0+PTX")]
)
def test_operators_are_built_for_this_gpu_where_deepspeed_cannot_read_the_targets(monkeypatch, named, kept):
    monkeypatch.setattr(os, "environ", {"TORCH_CUDA_ARCH_LIST": named, "HOME": "/"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launch._export(launch.read_environment({}), torch.device("cuda", 0))
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == kept


def test_the_program_prints_nothing_of_deepspeed_on_its_output(tmp_path):
    code = (
        "from datetime import timedelta; from megatron.engine import launch; "
        "launch.start(launch.read_environment(), timedelta(seconds=60)); launch.stop()"
    )
    variables = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    variables |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == ""


LEAVING = """
import atexit, os
from megatron.engine.launch import leave
class Late:
    def __del__(self):  # runs in the interpreter's end, where gloo's threads abort as well
        os.abort()
late = Late()
atexit.register(print, "closed", end=".")
leave(3)
"""


def test_a_rank_leaves_before_the_interpreter_ends_and_loses_nothing(tmp_path):
    program, profile = tmp_path / "program.py", tmp_path / "profile"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def run(text, *words):
        program.write_text(text)
        command = [sys.executable, *words, str(program)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    for words in ((), ("-m", "cProfile", "-o", str(profile))):  # which writes when the program is left
        left = run(LEAVING, *words)
        assert (left.returncode, left.stdout, left.stderr) == (3, "closed.", "")
    assert profile.stat().st_size > 0
    assert run(LEAVING.replace("leave(3)", "")).returncode < 0
