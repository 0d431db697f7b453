"""A checkpoint that one process wrote from logical tensors, as a conversion does, starts a training."""

import pytest
import torch

from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.whole import write_checkpoint
from tests.layouts.recorded import COMMON
from tests.ranks import run_on_ranks
from tests.training.starts import is_fresh, refusal, start

LAYOUTS = ["--micro-batch-size 2", "--micro-batch-size 1 --zero-stage 3", "--pipeline-model-parallel-size 2"]
FLAGS = [*COMMON, "--optimizer", "adam", "--hidden-dropout", "0.1"]


def outcomes_of_converted(folder):
    """Start from weights alone, in three layouts; the model section is all that the checkpoint says of a run."""
    import json

    from megatron.config.run import parse_run_config
    from tests.training.runs import is_rank

    whole = start(FLAGS)
    root = folder / "converted"
    if is_rank(0):
        config = json.loads(json.dumps({"model": parse_run_config(FLAGS).to_json()["model"]}))
        run_of_one = [(name, torch.full(sharding.logical_shape, 0.01)) for name, sharding in whole.shardings.items()]
        paddings = {name: sharding.padding for name, sharding in whole.shardings.items() if sharding.padding}
        write_checkpoint(
            root, run_of_one, config=config, paddings=paddings, iteration=7, counters={"consumed_samples": 28}
        )
    torch.distributed.barrier()
    found = {"refused": refusal([*FLAGS, "--load", str(root)])}
    for layout in LAYOUTS:
        load = [*FLAGS, *layout.split(), "--load", str(root)]
        found[layout] = [start([*load, "--finetune"]), start([*load, "--no-load-optim"])]
    (path,) = [path for path in root.iterdir() if path.is_dir()]
    held = {layout: [is_right(one, path) and is_fresh(one) for one in found[layout]] for layout in LAYOUTS}
    told = {
        layout: [(one.state.iteration, one.state.consumed_samples, one.said) for one in found[layout]]
        for layout in LAYOUTS
    }
    return found["refused"], held, told


def is_right(started, path):
    tensors = open_tensors(path)
    return all(
        tensor.equal(tensors.read_range(name, kind, started.shardings[name], begin, tensor.numel()))
        for (name, kind, _, begin), tensor in started.kind(weights=True).items()
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_on_ranks(2, outcomes_of_converted, tmp_path_factory.mktemp("c"), initialize=False, deepspeed=True)


def test_weights_alone_need_a_word_about_the_optimizer(outcomes):
    for refused, _, _ in outcomes:
        assert "holds weights and no optimizer state: add --no-load-optim" in refused


def test_weights_are_taken_into_every_layout(outcomes):
    for _, held, _ in outcomes:
        assert held == {layout: [True, True] for layout in LAYOUTS}


def test_counters_continue_unless_a_new_training_begins(outcomes):
    _, _, told = outcomes[0]
    for finetuned, continued in told.values():
        assert finetuned[:2] == (0, 0)
        assert continued[:2] == (7, 28)
        assert "does not tell its samples" in continued[2]
        assert "new random streams begin" in continued[2]
