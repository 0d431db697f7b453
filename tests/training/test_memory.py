"""What DeepSpeed holds for the parameters of a run, measured on CPUs, and the sums that are made of it."""

import gc
import shlex

import pytest
import torch

from megatron.config.run import load_run_config, parse_run_config
from megatron.training.benchmark import predict_run
from tests.ranks import run_on_ranks

RUN = shlex.split(
    """
    --num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 8 --vocab-size 256 --mock-data
    --train-iters 2 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --num-workers 0
    """
)
"""Parameters are all there is: 16 tokens beside 3 million of them."""


def storages():
    """Bytes of every storage that a tensor of this process holds, by its address."""
    gc.collect()
    found = {}
    for tensor in [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]:
        for held_by in (tensor, tensor.grad if tensor.is_leaf else None):
            if held_by is not None and held_by.device.type == "cpu":
                storage = held_by.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def held(flags):
    """Bytes that a rank has beyond those at its start when its last forward pass begins."""
    from megatron.engine.launch import read_environment
    from megatron.training.build import build_trainer

    before = storages()
    environment = read_environment()
    trainer = build_trainer(parse_run_config(flags, environment.world_size, rank=environment.rank), environment)
    forward, sizes = trainer.engine._forward, []

    def noted(micro_batch):
        sizes.append(sum(size for address, size in storages().items() if address not in before))
        return forward(micro_batch)

    trainer.engine._forward = noted
    trainer.fit()
    return sizes[-1]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--precision bf16"),
        (2, "--precision bf16"),
        (1, "--precision fp32 --zero-stage 0"),
    ],
)
def test_deepspeed_holds_what_is_predicted_when_a_later_micro_batch_begins(ranks, flags):
    words = [*RUN, *shlex.split(flags), "--global-batch-size", str(2 * ranks)]
    options = {"initialize": False, "deepspeed": True}
    predicted = predict_run(load_run_config(words, ranks).config, ranks, on_gpu=False)
    for found in run_on_ranks(ranks, held, words, **options):
        assert found == pytest.approx(predicted.state.total, rel=0.05)


def plan(*words, ranks=1):
    run = [*RUN, "--seq-length", "1024", "--vocab-size", "50304", *words]
    return predict_run(load_run_config(run, ranks).config, ranks)


def test_recompute_trades_activations_for_one_unit_at_work():
    everything, recomputed = plan(), plan("--recompute-granularity", "full")
    assert recomputed.activations < everything.activations / 8
    assert recomputed.state == everything.state
    on_host = plan("--recompute-granularity", "full", "--recompute-inputs-on-host")
    assert on_host.activations < recomputed.activations
    budget = plan("--recompute-granularity", "products", "--recompute-budget-gib", "0.01")
    assert recomputed.activations < budget.activations <= recomputed.activations + 0.01 * 2**30
    first = plan("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "2")
    assert recomputed.activations < first.activations < everything.activations


def test_a_kept_product_that_backward_reads_is_counted_once():
    two_blocks = ("--recompute-granularity", "products", "--num-layers", "2", "--recompute-budget-gib")
    fewer, more = (plan(*two_blocks, gib) for gib in ("0.006", "0.012"))
    of_up = 2 * 1024 * 4 * 256
    assert more.activations - fewer.activations == 2 * of_up
    assert more.moments["backward"] - fewer.moments["backward"] == of_up


def test_the_first_step_has_no_numbers_of_the_optimizers_own_before_its_end():
    run = plan("--recompute-granularity", "full")
    assert run.peak == run.moments["loss"]
    assert run.first_peak == run.moments["step"] > run.moments["loss"] - 8 * run.parameters
    long = plan("--recompute-granularity", "full", "--seq-length", "8192")
    assert long.first_peak == long.peak - 8 * long.parameters


def test_gradients_peak_at_the_end_of_backward_where_no_activations_go_as_they_come():
    few = ["--recompute-granularity", "full", "--seq-length", "256", "--vocab-size", "256", "--num-layers", "16"]
    on_host = plan(*few, "--recompute-inputs-on-host")
    assert on_host.moments["end of backward"] > on_host.moments["backward"]
    of_blocks = 15 / 16 * on_host.state.made
    gone = 256 * 256 * 2  # an input that comes from the host while the unit before it is recomputed
    assert on_host.moments["end of backward"] - on_host.moments["backward"] == of_blocks - gone
    long = plan("--recompute-granularity", "full", "--seq-length", "65536", "--loss-chunk-size", "64")
    assert long.moments["end of backward"] < long.moments["backward"] == long.peak


def test_zero_divides_one_thing_more_with_each_stage():
    peaks = [plan("--zero-stage", str(stage), "--global-batch-size", "32", ranks=16).state for stage in (1, 2, 3)]
    one, two, three = peaks
    assert one.optimizer == two.optimizer == three.optimizer == plan().state.optimizer / 16
    assert (one.weights, two.weights) == (plan().state.weights, plan().state.weights)
    assert one.gradients > two.gradients == three.gradients
    assert plan("--cpu-optimizer", "--global-batch-size", "2").state.optimizer == 0


def test_the_fullest_stage_of_a_pipeline_counts():
    words = ["--pipeline-model-parallel-size", "4", "--global-batch-size", "8", "--zero-stage", "1"]
    first = plan(*words, "--pipeline-partition", "1,1,1,1", ranks=4)
    assert first.stage == 3  # with the head
    heavy = plan(*words, "--pipeline-partition", "1,1,1,1", "--seq-length", "16384", "--loss-chunk-size", "64", ranks=4)
    assert heavy.stage == 0  # with four micro-batches in flight
    assert max(heavy.moments, key=heavy.moments.get) == heavy.moment


def test_one_line_tells_the_peak_and_its_parts():
    line = plan().describe()
    assert line.startswith(" memory: predicted peak ")
    assert "GiB, at the loss (weights " in line
    assert "host" not in line
    on_host = plan("--recompute-granularity", "full", "--recompute-inputs-on-host", "--seq-length", "65536")
    assert on_host.describe().endswith("; on the host 0.12 GiB of pinned memory")  # 4 units x 65536 x 256 x 2 bytes
