"""The benchmark of checkpoints, on a run that takes no time: every way to save and load has its line."""

import shlex
import subprocess
import sys
from pathlib import Path

from tools.benchmark_checkpoint import PARTS

WAYS = (
    *("save ", "verify", "load ", "load again", "load into --zero-stage 3", "read as", "torch.save", "torch.load"),
    *("DeepSpeed's save", "DeepSpeed's load", "export to Hugging Face", "first save in the background: training waits"),
    "second save in the background: until",
)
RUN = shlex.split(
    """
    --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 40 --mock-data --num-workers 0
    --activation-function gelu_tanh
    --precision bf16 --zero-stage 1 --micro-batch-size 1 --global-batch-size 1 --train-iters 2 --lr 1e-3
    """
)


def test_each_way_to_save_and_load_is_measured_and_nothing_stays(tmp_path):
    root = Path(__file__).parents[2]
    tool = [sys.executable, str(root / "tools/benchmark_checkpoint.py"), "--folder", str(tmp_path)]
    kept = tmp_path / "kept"
    flags = ["--deepspeed", "--other", "--zero-stage 3", "--keep", str(kept), *RUN]
    run = subprocess.run([*tool, *flags], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.endswith("GB/s")]
    for what in WAYS:
        assert any(row.startswith(what) for row in rows), run.stdout
    assert list(tmp_path.iterdir()) == [kept]
    again = [*tool, "--checkpoint", str(kept), *RUN, "--zero-stage", "2", "--other", "--zero-stage 0 --precision fp32"]
    run = subprocess.run(again, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    first, second = [line for line in run.stdout.splitlines() if line.endswith("GB/s")]
    assert first.startswith("load into the layout of the flags")
    assert second.startswith("load into --zero-stage 0")


def test_parts_can_be_left_out(tmp_path):
    root = Path(__file__).parents[2]
    tool = [sys.executable, str(root / "tools/benchmark_checkpoint.py"), "--folder", str(tmp_path)]
    without = [word for part in PARTS for word in ("--without", part)]
    run = subprocess.run([*tool, *without, *RUN], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines() if line.endswith("GB/s")] == ["save"]


def test_flags_that_do_not_fit_are_told(tmp_path):
    root = Path(__file__).parents[2]
    tool = [sys.executable, str(root / "tools/benchmark_checkpoint.py"), "--folder", str(tmp_path), *RUN]
    run = subprocess.run([*tool, "--hidden-size", "15"], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 2
    assert "--hidden-size" in run.stderr
