"""Runs whose blocks are recorded: bit for bit the losses of runs whose blocks are not, and memory does not grow."""

import shlex

import pytest
import torch

from megatron.config.run import load_run_config
from megatron.training.benchmark import predict_run
from tests.ranks import run_on_ranks
from tests.training.runs import losses, run, write_data

RUN = shlex.split(
    """
    --num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --make-vocab-size-divisible-by 16
    --micro-batch-size 2 --global-batch-size 4 --train-iters 20 --precision bf16 --lr 1e-3 --log-interval 1
    --eval-interval 6 --eval-iters 2 --num-workers 0
    """
)
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
CASES = {
    "dropout": "--attention-backend unfused",
    "no dropout": f"--attention-backend unfused {NO_DROPOUT}",
    "plain torch": "--attention-backend unfused --no-fused-kernels",
    "Triton's attention": "--attention-backend flash_triton",
    "as Llama": (
        f"--attention-backend flash_triton {NO_DROPOUT} --position-embedding-type rope --normalization rmsnorm "
        "--activation-function swiglu --no-add-bias-linear --untie-embeddings-and-output-weights"
    ),
}


def trained_both_ways(folder):
    """Of each case the losses of a run without and with graphs, and the memory of the latter before some steps."""
    data = write_data(folder / "data")
    found = {}
    for name, more in CASES.items():
        held = {}

        def note(iteration, held=held):
            torch.cuda.synchronize()
            held[iteration] = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())

        flags = [*RUN, *data, *shlex.split(more)]
        assert run([*flags, "--save", str(folder / f"{name} plain")]) == 0
        assert run([*flags, "--save", str(folder / f"{name} graphed"), "--cuda-graph"], before_step=note) == 0
        both = [folder / f"{name} {kind}" for kind in ("plain", "graphed")]
        found[name] = [{kind: losses(path, kind) for kind in ("train", "evaluation")} for path in both], held
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    return run_on_ranks(1, trained_both_ways, folder, initialize=False, deepspeed=True, timeout=400)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_recorded_run_has_the_losses_of_an_ordinary_one(found, name):
    (plain, recorded), _ = found[name]
    assert len(plain["train"]) == 20
    assert recorded == plain


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_memory_of_a_recorded_run_does_not_grow(found, name):
    _, held = found[name]
    assert held[19] == held[8], held


def refuse():
    with pytest.raises(Exception, match="--cuda-graph is work that a GPU repeats, and this run computes on a cpu"):
        run([*RUN, "--mock-data", "--vocab-size", "64", "--cuda-graph"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_refuses_in_a_sentence():
    run_on_ranks(1, refuse, initialize=False, deepspeed=True)


def test_the_pool_of_a_recorded_run_is_predicted_on_top_of_head_and_optimizer():
    flags = [*RUN, "--mock-data", "--vocab-size", "50304"]
    plain, recorded = (predict_run(load_run_config([*flags, *more], 1).config, 1) for more in ([], ["--cuda-graph"]))
    assert recorded.moments["backward"] == plain.moments["backward"]
    pool = recorded.moments["step"] - plain.moments["step"]
    assert pool >= plain.activations
    assert recorded.moments["loss"] == pytest.approx(plain.moments["loss"] + pool - plain.activations)
