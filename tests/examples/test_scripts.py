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
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.sh") if path != LAUNCHER)


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


def test_launcher_starts_torchrun_on_one_machine_or_several():
    words = run_script(LAUNCHER, "pretrain_gpt.py", LAUNCHER="torchrun", NUM_GPUS="2").stdout.splitlines()
    assert words[1:6] == ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    several = {"NUM_NODES": "2", "MASTER_ADDR": "first", "NODE_RANK": "1"}
    words = run_script(LAUNCHER, "pretrain_gpt.py", LAUNCHER="torchrun", NUM_GPUS="2", **several).stdout.splitlines()
    assert words[words.index("--master-addr") + 1] == "first"
    assert words[words.index("--node-rank") + 1] == "1"


def test_launcher_starts_srun_with_a_task_for_each_rank():
    words = run_script(LAUNCHER, "pretrain_gpt.py", LAUNCHER="srun", NUM_GPUS="8", NUM_NODES="2").stdout.splitlines()
    assert words[:5] == ["srun", "--nodes", "2", "--ntasks-per-node", "8"]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"HOSTFILE": "/no/such/hosts"}, "HOSTFILE=/no/such/hosts does not exist"),
        ({"NUM_NODES": "2"}, "NUM_NODES=2 needs HOSTFILE"),
        ({"NUM_NODES": "2", "LAUNCHER": "torchrun"}, "needs MASTER_ADDR and this machine's NODE_RANK"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun is not one of deepspeed, torchrun, srun"),
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
