"""What an engine promises beside parity: evaluation, empty and fully masked steps, fp16's loss scale, its module."""

import math
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.engine import toy
from tests.ranks import run_on_ranks


def mean_loss(batches):
    model = toy.ToyModel()
    loss = sum(model(batch.tokens, batch.labels, batch.loss_mask) for batch in batches)
    tokens = sum(batch.labels.numel() if batch.loss_mask is None else batch.loss_mask.sum() for batch in batches)
    return loss, tokens


def evaluate_between_steps(stage):
    rank = dist.get_rank()
    engine = toy.build_engine(toy.run_config(stage=stage))
    evaluated = []
    for masked, count in ((True, 3), (False, 1)):
        loss, tokens = engine.evaluate(toy.make_batches(5, rank, 2, count, masked))
        expected, number = mean_loss([b for r in range(2) for b in toy.make_batches(5, r, 2, count, masked)])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert tokens.item() == number
        evaluated.append(loss.item())
    assert engine.module.training
    steps = [engine.train_step(toy.make_batches(0, rank, 2, 2), 0.1, 0.1).loss.item()]
    engine.evaluate(toy.make_batches(5, rank, 2, 3))
    steps.append(engine.train_step(toy.make_batches(1, rank, 2, 2), 0.1, 0.1).loss.item())
    engine.close()
    undisturbed = toy.build_engine(toy.run_config(stage=stage))
    plain = [undisturbed.train_step(toy.make_batches(step, rank, 2, 2), 0.1, 0.1).loss.item() for step in range(2)]
    undisturbed.close()
    assert steps == plain
    return evaluated


def evaluate_at_each_stage():
    linear = F.linear
    losses = [evaluate_between_steps(stage) for stage in range(4)]
    assert F.linear is linear, "an engine that is closed leaves torch as it was"
    return losses


def test_evaluation_sums_over_all_ranks_and_leaves_training_as_it_is():
    first, second = run_on_ranks(2, evaluate_at_each_stage, deepspeed=True)
    assert first == second


def time_a_step():
    engine = toy.build_engine(toy.run_config(stage=1))
    started = time.perf_counter()
    result = engine.train_step(toy.make_batches(0, 0, 1, 2), 0.1, 0.1)
    seconds = time.perf_counter() - started
    engine.close()
    return result.inner_seconds, seconds


def test_a_step_tells_how_long_deepspeed_had_the_host():
    ((inner, seconds),) = run_on_ranks(1, time_a_step, deepspeed=True)
    assert 0 < inner < seconds


def take_edge_steps():
    """On one rank: a step without masks, one whose mask is all zero, none at all, and fp16 at its lowest scale."""
    engine = toy.build_engine(toy.run_config(stage=1))
    batches = toy.make_batches(0, 0, 1, 2, masked=False)
    loss, tokens = mean_loss(batches)
    assert engine.train_step(batches, 0.1, 0.1).loss.item() == pytest.approx((loss / tokens).item(), rel=1e-5)
    (batch,) = toy.make_batches(0, 0, 1, 1)
    nothing = toy.ToyBatch(tokens=batch.tokens, labels=batch.labels, loss_mask=torch.zeros_like(batch.loss_mask))
    before = toy.full_weights(engine)
    result = engine.train_step([nothing], 0.0, 0.0)
    assert result.loss.item() == 0.0
    assert result.grad_norm.item() == 0.0
    assert not result.skipped
    assert all(torch.equal(weight, before[name]) for name, weight in toy.full_weights(engine).items())
    with pytest.raises(ValueError, match="at least one micro-batch"):
        engine.train_step([], 0.1, 0.1)
    engine.close()

    toy.pretend_fp16_works()
    lowest = {"initial_loss_scale": 4.0, "min_loss_scale": 4.0, "hysteresis": 1}
    engine = toy.build_engine(toy.run_config(stage=1, precision="fp16", **lowest))
    results = []
    for step in range(3):
        engine.module.poison = math.inf
        results.append(engine.train_step(toy.make_batches(step, 0, 1, 1), 0.1, 0.1))
    engine.close()
    return [(result.skipped, result.loss_scale) for result in results]


def test_edge_steps_are_steps_and_fp16_at_its_lowest_scale_goes_on_skipping():
    assert run_on_ranks(1, take_edge_steps, deepspeed=True) == [[(True, 4.0)] * 3]


def train_fp16(stages):
    """Weights after four steps of SGD, with a loss scale that grows at each step and with a constant one."""
    toy.pretend_fp16_works()
    outcomes = []
    for stage in stages:
        scales, weights = [], []
        for rules in ({"loss_scale_window": 1}, {"loss_scale": 64.0}):
            config = toy.run_config(stage=stage, precision="fp16", optimizer="sgd", initial_loss_scale=64.0, **rules)
            engine = toy.build_engine(config)
            batches = [toy.make_batches(step, 0, 1, 2) for step in range(4)]
            scales.append([engine.train_step(batch, 0.1, 0.0).loss_scale for batch in batches])
            weights.append(toy.full_weights(engine))
            engine.close()
        outcomes.append((scales, weights))
    return outcomes


def test_a_growing_loss_scale_does_not_change_the_updates():
    for (growing, constant), (weights, expected) in run_on_ranks(1, train_fp16, (1, 2, 3), deepspeed=True)[0]:
        assert growing == [64.0, 64.0, 128.0, 256.0]
        assert constant == [64.0] * 4
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=2e-3, atol=2e-4)
