"""Runs whose blocks are recorded: bit for bit the losses of runs whose blocks are not, and memory does not grow."""

import shlex

import pytest
import torch

from megatron.config.run import load_run_config, parse_run_config
from megatron.engine.launch import read_environment
from megatron.parallel import graphed
from megatron.training.benchmark import predict_run
from megatron.training.build import build_trainer
from tests.emulated_graphs import Emulated
from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, losses, run, write_data

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
    "plain torch": "--attention-backend unfused --no-fused-kernels",
    "Triton's attention": "--attention-backend flash_triton",
    "as Llama": (
        f"--attention-backend flash_triton {NO_DROPOUT} --position-embedding-type rope --normalization rmsnorm "
        "--activation-function swiglu --no-add-bias-linear --untie-embeddings-and-output-weights"
    ),
}
KINDS = ("train", "evaluation")


def trained_both_ways(folder, more):
    """Losses of a run without and with graphs, and the memory of the latter before each step."""
    flags = [*RUN, *write_data(folder / "data"), *shlex.split(more)]
    held = {}

    def note(iteration):
        torch.cuda.synchronize()
        held[iteration] = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())

    assert run([*flags, "--save", str(folder / "plain")]) == 0
    assert run([*flags, "--save", str(folder / "graphed"), "--cuda-graph"], before_step=note) == 0
    return [{kind: losses(folder / name, kind) for kind in KINDS} for name in ("plain", "graphed")], held


@pytest.fixture(scope="module", params=CASES)
def found(request, tmp_path_factory):
    """In processes of their own: what fails while it is recorded leaves a process that can record no more."""
    on_gpu = {"backend": "nccl", "initialize": False, "deepspeed": True, "timeout": 120}
    return run_on_ranks(1, trained_both_ways, tmp_path_factory.mktemp("graphs"), CASES[request.param], **on_gpu)[0]


@pytest.mark.gpu
def test_a_recorded_run_has_the_losses_of_an_ordinary_one(found):
    (plain, recorded), _ = found
    assert len(plain["train"]) == 20
    assert recorded == plain


@pytest.mark.gpu
def test_the_memory_of_a_recorded_run_does_not_grow(found):
    _, held = found
    assert held[19] == held[8], held


def trained_on_a_cpu(folder):
    """Losses of two trainings, the blocks of the latter repeated by Python."""
    graphed._Recording = Emulated
    flags = [*FLAGS, "--precision", "bf16", *write_data(folder / "data")]
    found, passes = [], []
    for name in ("plain", "graphed"):
        trainer = build_trainer(parse_run_config([*flags, "--save", str(folder / name)]), read_environment())
        model = trainer.engine.module
        if name == "graphed":
            model.graph_blocks()
        repeated = model._graphed_blocks
        assert trainer.fit() == 0
        found.append({kind: losses(folder / name, kind) for kind in KINDS})
        passes.append(0 if repeated is None else repeated._recording.passes)
        assert model._graphed_blocks is None, "released when the run ends"
    return found, passes


def test_fp32_sums_take_the_gradients_of_repeated_micro_batches_in_time(tmp_path):
    ((plain, repeated), passes), *_ = run_on_ranks(1, trained_on_a_cpu, tmp_path, initialize=False, deepspeed=True)
    assert passes == [0, 2 * 36], "forward and backward of 72 samples, two at a time"
    assert repeated == plain


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
