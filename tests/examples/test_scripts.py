"""Every script in examples_deepspeed/ starts a run that the config accepts, at the world size that it states."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron.config.run import parse_run_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples_deepspeed"
LAUNCHER = EXAMPLES / "launch.sh"
SHARED = EXAMPLES / "pretrain.sh"
MACHINES = {"LAUNCHER": "torchrun", "NUM_NODES": "2", "MASTER_ADDR": "first"}
FINETUNE = EXAMPLES / "finetune_hf.sh"  # needs a model: see test_finetune.py
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.sh") if path not in (LAUNCHER, SHARED, FINETUNE))


def run_script(script: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHON") if name in os.environ}
    return subprocess.run(
        ["bash", str(script), *words],
        env=inherited | {"DRY_RUN": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def stated_world_size(script: Path) -> int:
    stated = re.search(r"^# world size: (\d+)$", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert stated, f"{script.name} has no line '# world size: N'"
    return int(stated.group(1))


def flags_after_entry_script(command: str) -> list[str]:
    words = command.splitlines()
    entry = next(number for number, word in enumerate(words) if word.endswith("pretrain_gpt.py"))
    return words[entry + 1 :]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_is_a_legal_run_at_its_world_size(script, capsys):
    world_size = stated_world_size(script)
    result = run_script(script, NUM_GPUS=str(world_size))
    assert result.returncode == 0, result.stderr
    config = parse_run_config(flags_after_entry_script(result.stdout), world_size)
    assert config.training.global_batch_size % (config.training.micro_batch_size * world_size) == 0
    assert capsys.readouterr().err == ""  # no retired flag, no note


def test_flags_at_the_end_win_over_the_scripts_own():
    result = run_script(EXAMPLES / "pretrain_gpt_125M.sh", "--lr", "1e-3", TRAIN_ITERS="7", NUM_GPUS="1")
    config = parse_run_config(flags_after_entry_script(result.stdout), 1)
    assert (config.optimizer.lr, config.training.train_iters) == (1e-3, 7)


def test_launcher_starts_one_rank_for_each_gpu_asked_for():
    words = run_script(LAUNCHER, "pretrain_gpt.py", "--lr", "1", NUM_GPUS="4").stdout.splitlines()
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert words[words.index("--num_gpus") + 1] == "4"
    assert words[-2:] == ["--lr", "1"]


def test_launcher_keeps_to_the_visible_gpus():
    words = run_script(LAUNCHER, "pretrain_gpt.py", NUM_GPUS="2", CUDA_VISIBLE_DEVICES="2,3,5").stdout.splitlines()
    assert words[words.index("--include") + 1] == "localhost:2,3"
    assert "--num_gpus" not in words


def launched(**variables: str) -> list[str]:
    result = run_script(LAUNCHER, "pretrain_gpt.py", **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_launcher_starts_torchrun_on_one_machine_or_several():
    words = launched(LAUNCHER="torchrun", NUM_GPUS="2")
    assert words[1:6] == ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = launched(LAUNCHER="torchrun", NUM_GPUS="2", NUM_NODES="2", MASTER_ADDR="first", NODE_RANK="1")
    assert (value(words, "--master-addr"), value(words, "--node-rank")) == ("first", "1")


def test_launcher_starts_srun_with_a_task_for_each_rank():
    words = launched(LAUNCHER="srun", NUM_GPUS="8", NUM_NODES="2")
    assert words[:5] == ["srun", "--nodes", "2", "--ntasks-per-node", "8"]
    assert "--kill-on-bad-exit=1" in words


def test_launcher_takes_the_size_of_a_slurm_job(tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
    words = launched(**job, SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="6")
    assert words[0] == "srun"
    assert [value(words, name) for name in ("--nodes", "--ntasks-per-node", "--cpus-per-task")] == ["3", "4", "6"]


@pytest.mark.parametrize("variables", [{"OMPI_COMM_WORLD_RANK": "1"}, {"PMI_RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "2"}])
def test_launcher_is_a_rank_where_mpirun_or_srun_has_started_it_for_each(variables):
    assert launched(**variables)[1:] == ["pretrain_gpt.py"]


def test_launcher_takes_hosts_and_slots_of_a_hostfile(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nalpha.invalid slots=4\n\nbeta.invalid slots=4\n")
    words = launched(HOSTFILE=str(hosts))
    assert [value(words, name) for name in ("--hostfile", "--num_nodes", "--num_gpus")] == [str(hosts), "2", "4"]
    assert "--no_ssh" not in words
    words = launched(HOSTFILE=str(hosts), NODE_RANK="1", NUM_GPUS="2")
    assert "--no_ssh" in words
    assert [value(words, name) for name in ("--node_rank", "--master_addr")] == ["1", "alpha.invalid"]
    words = launched(HOSTFILE=str(hosts), LAUNCHER="mpirun")
    assert [value(words, name) for name in ("-np", "--map-by", "--hostfile")] == ["8", "ppr:4:node", str(hosts)]
    words = launched(HOSTFILE=str(hosts), LAUNCHER="torchrun", NODE_RANK="1")
    assert [value(words, name) for name in ("--node-rank", "--master-addr")] == ["1", "alpha.invalid"]


def test_torchrun_finds_its_machine_in_the_hostfile(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("alpha.invalid slots=1\n127.0.0.1 slots=1\n")
    assert value(launched(HOSTFILE=str(hosts), LAUNCHER="torchrun"), "--node-rank") == "1"
    hosts.write_text("alpha.invalid slots=1\nbeta.invalid slots=1\n")
    result = run_script(LAUNCHER, "pretrain_gpt.py", HOSTFILE=str(hosts), LAUNCHER="torchrun")
    assert "or a HOSTFILE that names this machine" in result.stderr


@pytest.mark.parametrize(
    ("text", "variables", "sentence"),
    [
        ("a slots=2\nb 2\n", {}, "line 2: 'b 2' is not of the form 'host slots=N'"),
        ("a slots=0\n", {}, "line 1: 'a slots=0' is not of the form"),
        ("a slots=2\nb slots=2\na slots=2\n", {}, "line 3: the host a is there twice"),
        ("# nothing\n", {}, "names no host"),
        ("a slots=2\n", {"NUM_NODES": "2"}, "NUM_NODES=2, and"),
        ("a slots=2\nb slots=4\n", {"NUM_GPUS": "4"}, "NUM_GPUS=4, and a has slots=2"),
        ("a slots=2\nb slots=4\n", {}, "different slots (a 2, b 4)"),
    ],
)
def test_a_wrong_hostfile_is_refused_in_one_sentence(tmp_path, text, variables, sentence):
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    result = run_script(LAUNCHER, "pretrain_gpt.py", HOSTFILE=str(hosts), **variables)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"HOSTFILE": "/no/such/hosts"}, "HOSTFILE=/no/such/hosts does not exist"),
        ({"NUM_NODES": "2"}, "NUM_NODES=2 needs HOSTFILE"),
        ({"NUM_NODES": "2", "LAUNCHER": "torchrun"}, "needs MASTER_ADDR and this machine's NODE_RANK"),
        ({"NUM_NODES": "2", "LAUNCHER": "mpirun"}, "LAUNCHER=mpirun with NUM_NODES=2 needs HOSTFILE"),
        ({"LAUNCHER": "rsh"}, "LAUNCHER=rsh is not one of deepspeed, torchrun, srun, mpirun, none"),
        ({"NUM_GPUS": "0"}, "NUM_GPUS=0 is not a whole number of at least 1"),
        ({"NUM_NODES": "two"}, "NUM_NODES=two is not a whole number"),
        (MACHINES | {"NODE_RANK": "2"}, "NODE_RANK=2 is not the number of a machine, 0 to 1"),
        (MACHINES | {"NODE_RANK": "one"}, "NODE_RANK=one is not the number of a machine"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f1c"}, "use numbers or LAUNCHER=torchrun"),
        ({"DRY_RUN": "", "LAUNCHER": "srun"}, "works inside a SLURM job"),
    ],
)
def test_launcher_refuses_in_one_sentence(variables, sentence):
    result = run_script(LAUNCHER, "pretrain_gpt.py", **{"NUM_GPUS": "1"} | variables)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stdout == ""


def test_launcher_names_a_script_that_is_not_there():
    result = run_script(LAUNCHER, "pretrain_gtp.py")
    assert result.returncode == 2
    assert "pretrain_gtp.py is no file" in result.stderr
