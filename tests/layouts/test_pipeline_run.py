"""Whole runs in a pipeline: the flat run's losses, and a resumed run that is the uninterrupted one bit for bit."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, is_rank, losses, run, write_data

NO_DROPOUT = ["--hidden-dropout", "0", "--attention-dropout", "0", "--log-params-norm"]
PIPELINE = ["--pipeline-model-parallel-size", "2", "--num-layers", "3"]


def train_once(folder, flags):
    """Train without dropout: the ramp of the batch, weight decay and learning rate of each step included."""
    code = run([*FLAGS, *write_data(folder / f"data_{os.environ['RANK']}"), *NO_DROPOUT, *flags, "--save", str(folder)])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [
        [record[name] for name in ("lm_loss", "grad_norm", "params_norm") if name in record]
        for record in records
        if record["kind"] in ("train", "evaluation")
    ]
    return code, numbers


def work(folder):
    folder = Path(folder)
    (folder / "once").mkdir(exist_ok=True)
    once = train_once(folder / "once", PIPELINE)
    flags = [*FLAGS, *write_data(folder / f"data_{os.environ['RANK']}"), *PIPELINE, "--precision", "bf16"]
    parts = str(folder / "parts")
    again = [*flags, "--save", parts, "--load", parts, "--load-if-exists", "--save-interval", "3"]

    def ask_last_rank_to_stop(iteration):
        if iteration == 4 and is_rank(1):
            os.kill(os.getpid(), signal.SIGTERM)

    codes = [run([*flags, "--save", str(folder / "whole")]), run(again, before_step=ask_last_rank_to_stop), run(again)]
    codes.append(run([*again, "--pipeline-partition", "1,2", "--verify-resume"]))
    pairs = [[losses(folder / name, kind) for name in ("whole", "parts")] for kind in ("train", "evaluation")]
    return once, codes, pairs


def test_a_pipelined_run_is_the_flat_one_and_resumes_bit_for_bit(tmp_path):
    (once, codes, pairs), _ = run_on_ranks(2, work, str(tmp_path), initialize=False, deepspeed=True)
    (flat,) = run_on_ranks(1, train_once, tmp_path, PIPELINE[2:], initialize=False, deepspeed=True)
    assert once[0] == flat[0] == 0
    assert len(once[1]) == len(flat[1]) > 12
    for step, expected in zip(once[1], flat[1], strict=True):
        assert step == pytest.approx(expected, rel=1e-5)
    assert codes == [0, 143, 0, 0]  # the last one with its blocks divided in another way
    for whole, parts in pairs:
        assert parts == whole
        assert whole
