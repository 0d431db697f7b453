import json

import pytest

from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, run


def norms_of_stages(folder):
    for stage in (1, 3):
        more = ["--log-params-norm", "--train-iters", "3", "--zero-stage", str(stage)]
        run([*FLAGS, "--mock-data", "--vocab-size", "64", *more, "--metrics-file", str(folder / f"{stage}.jsonl")])


def test_norm_of_all_weights_does_not_depend_on_how_they_are_sharded(tmp_path):
    run_on_ranks(2, norms_of_stages, tmp_path, initialize=False, deepspeed=True)
    whole, sharded = (
        [
            record["params_norm"]
            for record in map(json.loads, (tmp_path / f"{stage}.jsonl").read_text().splitlines())
            if record["kind"] == "train"
        ]
        for stage in (1, 3)
    )
    assert len(whole) == 3
    assert whole[0] > 1
    assert sharded == pytest.approx(whole, rel=1e-5)
