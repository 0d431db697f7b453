"""The model of a step's time: what it counts is what runs do, and what it predicts is what was measured."""

import math
import shlex
from unittest import mock

import pytest
import torch.distributed as dist

from megatron.config.errors import ConfigError
from megatron.config.run import load_run_config, parse_run_config
from megatron.training.benchmark import predict_seconds
from megatron.training.cluster import Cluster, Link
from megatron.training.step_cost import PARTS
from tests.ranks import run_on_ranks

RUN = shlex.split(
    """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 48 --vocab-size 256 --mock-data
    --train-iters 1 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --num-workers 0
    --micro-batch-size 2
    """
)
FREE = Link(0.0, math.inf)
TENSOR = "--tensor-model-parallel-size 2 --global-batch-size 2"
SHARDED = f"{TENSOR} --sequence-parallel"


def predict(flags, ranks, *, local=FREE, network=FREE, flops=1e15, run=RUN, **changes):
    config = load_run_config([*run, *shlex.split(flags)], ranks).config
    cluster = Cluster(flops=flops, ranks_per_host=8, local=local, network=network, **changes)
    return predict_seconds(config, ranks, cluster)


def trainer_of(flags):
    from megatron.engine.launch import read_environment
    from megatron.training.build import build_trainer

    environment = read_environment()
    return build_trainer(parse_run_config(flags, environment.world_size, rank=environment.rank), environment)


def hidden_states_told(flags):
    """Count the collectives of a step whose tensor is as large as the hidden states of a micro-batch."""
    from megatron.parallel import collectives

    sizes = []

    def noted(function, whole):
        def call(*args, **kwargs):
            sizes.append((args[whole] if args else kwargs["tensor"]).nbytes)
            return function(*args, **kwargs)

        return call

    trainer = trainer_of(flags)
    with (
        mock.patch.object(collectives, "_all_gather", noted(collectives._all_gather, 0)),
        mock.patch.object(collectives, "_reduce_scatter", noted(collectives._reduce_scatter, 1)),
        mock.patch.object(dist, "all_reduce", noted(dist.all_reduce, 0)),
    ):
        trainer.fit()
    return sizes.count(2 * 48 * 64 * 4)


@pytest.mark.parametrize(
    "flags",
    [
        SHARDED,
        f"{SHARDED} --keep-gathered-inputs",
        f"{SHARDED} --recompute-granularity full",
        TENSOR,
        f"{TENSOR} --recompute-granularity full --recompute-method block --recompute-num-layers 3",
    ],
)
def test_tensor_ranks_tell_each_other_as_often_as_is_counted(flags):
    counted = predict(f"{flags} --precision fp32", 2, local=Link(1.0, math.inf)).tensor
    words = [*RUN, *shlex.split(flags), "--precision", "fp32"]
    assert run_on_ranks(2, hidden_states_told, words, initialize=False, deepspeed=True) == [counted] * 2


def exchanges_made(flags):
    trainer = trainer_of(flags)
    with mock.patch.object(dist, "all_to_all_single", side_effect=dist.all_to_all_single) as exchange:
        trainer.fit()
    return exchange.call_count


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_ulysses_ranks_exchange_as_often_as_is_counted(recompute):
    flags = f"--ds-sequence-parallel-size 2 --global-batch-size 2 --recompute-granularity {recompute}"
    counted = predict(flags, 2, local=Link(1.0, math.inf)).ulysses
    words = [*RUN, *shlex.split(flags), "--precision", "fp32"]
    assert run_on_ranks(2, exchanges_made, words, initialize=False, deepspeed=True) == [counted] * 2


GPT = shlex.split(
    """
    --mock-data --vocab-size 50304 --train-iters 1 --lr 1e-4 --hidden-dropout 0 --attention-dropout 0
    --position-embedding-type rope --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048
    """
)
"""1.3B, of whose one-rank step of 32 sequences 1,007.2 ms were measured: 551.1 causal TFLOP/s."""
TP = "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 8 --global-batch-size 32"


@pytest.mark.parametrize(
    ("flags", "milliseconds"),
    [
        ("--micro-batch-size 8 --global-batch-size 64", 1026.4),
        (TP, 667.4),
        (f"{TP} --keep-gathered-inputs", 637.9),
        ("--pipeline-model-parallel-size 2 --micro-batch-size 4 --global-batch-size 32", 595.4),
    ],
)
def test_steps_of_two_h200_are_predicted_to_a_twentieth(flags, milliseconds):
    measured = {"flops": 551.1e12, "local": Link(27e-6, 258e9)}  # docs/performance.md
    assert predict(flags, 2, run=GPT, **measured).seconds == pytest.approx(milliseconds / 1e3, rel=0.05)


def test_one_rank_only_computes():
    cost = predict("--global-batch-size 4", 1, flops=1e9)
    assert cost.seconds == cost.compute == cost.ideal
    assert (cost.efficiency, cost.communication) == (1.0, 0.0)
    assert predict("--global-batch-size 8", 1, flops=1e9).seconds == pytest.approx(2 * cost.seconds)


def test_an_even_pipeline_waits_as_long_as_1f1b_fills():
    cost = predict("--pipeline-model-parallel-size 4 --global-batch-size 12 --vocab-size 1", 4)
    block = 2 * 12 * 64 * 64 + 4 * 64 * 48 / 2  # its products, and the half of attention that is causal
    head = 2 * 128 * 64  # of the smallest padded vocabulary, on the last stage
    assert cost.waiting / cost.compute == pytest.approx(3 * block / (6 * (block + head)))


def test_an_uneven_pipeline_is_as_slow_as_its_slowest_stage():
    flags = "--pipeline-model-parallel-size 2 --global-batch-size 200 --pipeline-partition"
    even, uneven = predict(f"{flags} 2,2", 2), predict(f"{flags} 1,3", 2)
    assert even.compute < uneven.compute
    assert uneven.efficiency < 0.75 * even.efficiency


LAYOUTS = [
    ("--zero-stage 0 --precision fp32 --global-batch-size 32", 16),
    ("--zero-stage 1 --global-batch-size 32", 16),
    ("--zero-stage 2 --global-batch-size 64", 16),
    ("--zero-stage 3 --global-batch-size 64", 16),
    ("--ds-sequence-parallel-size 4 --global-batch-size 8", 16),
    ("--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --global-batch-size 16", 16),
]


@pytest.mark.parametrize(("flags", "ranks"), LAYOUTS)
def test_slower_links_cost_time_that_is_called_communication(flags, ranks):
    slow = predict(flags, ranks, local=Link(1e-6, 1e9), network=Link(1e-5, 1e8))
    fast = predict(flags, ranks)
    assert sum(getattr(slow, part) for part in PARTS) == slow.seconds > fast.seconds
    assert (slow.host, fast.communication) == (0.0, 0.0)
    waiting = slow.waiting - fast.waiting  # stages wait for the messages of others as well
    assert slow.communication * slow.seconds + waiting == pytest.approx(slow.seconds - fast.seconds)


def test_what_zero_sends_beside_compute_costs_only_what_it_takes_longer():
    flags = "--zero-stage 3 --global-batch-size 64"
    link = {"local": Link(0, 1e12), "network": Link(0, 1e12)}
    hidden, shown = predict(flags, 16, flops=1e9, **link), predict(flags, 16, flops=1e15, **link)
    assert hidden.data == 0.0
    assert shown.data > 0.9 * shown.seconds


def test_a_slow_host_is_waited_for_in_each_micro_batch():
    flags = "--global-batch-size 6"
    cost = predict(flags, 1, host_seconds=1.0)
    assert (cost.seconds, cost.host) == (pytest.approx(3.0), pytest.approx(3.0 - cost.compute))
    sharded = {"flags": "--zero-stage 3 --global-batch-size 32", "ranks": 16, "network": Link(0, 1e6)}
    slower = predict(**sharded, host_seconds=0.1)
    assert slower.seconds == pytest.approx(predict(**sharded).seconds)  # weights take longer than the host
    assert slower.host + slower.compute == pytest.approx(0.1)


def test_shards_that_copies_hide_cost_nothing():
    def tensor(overlap, flops):
        return predict(f"{SHARDED} --tp-comm-overlap {overlap}", 2, local=Link(0.0, 1e9), flops=flops).tensor

    ends = 5 * 2 * 48 * 64 * 2 / 2 / 1e9  # the embedding's and the head's, which no product is beside
    assert tensor("copies", flops=1e9) == pytest.approx(ends)
    assert ends < tensor("copies", flops=1e13) < tensor("none", flops=1e13) == tensor("none", flops=1e9)


@pytest.mark.parametrize("flag", ["--cpu-optimizer", "--remote-device cpu --zero-stage 3"])
def test_what_waits_for_the_host_s_memory_is_not_predicted(flag):
    with pytest.raises(ConfigError, match=flag.split()[0]):
        predict(f"{flag} --global-batch-size 2", 1)
