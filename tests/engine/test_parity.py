"""A step of two data-parallel ranks is the step of one rank on the same samples, at every ZeRO stage."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.engine import toy
from tests.ranks import run_on_ranks

COUNTS = [3, 1, 2, 2]  # micro-batches of a rank: the batch size changes from step to step

CASES = [
    {"stage": stage, "optimizer": optimizer, "clip_grad": clip}
    for stage, optimizer, clip in itertools.product(range(4), ("sgd", "adam"), (0.0, 0.05))
]


def train(cases):
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for case in cases:
        engine = toy.build_engine(toy.run_config(**case))
        losses, norms = [], []
        for step, count in enumerate(COUNTS):
            result = engine.train_step(toy.make_batches(step, rank, size, count * 2 // size), toy.rate(step), 0.1)
            assert not result.skipped
            assert result.loss_scale == 1.0
            losses.append(result.loss.item())
            norms.append(result.grad_norm.item())
        results.append((losses, norms, toy.full_weights(engine)))
        engine.close()
    return results


@pytest.mark.parametrize("size", [1, 2])
def test_every_zero_stage_equals_plain_torch(size):
    for answers in run_on_ranks(size, train, CASES, deepspeed=True):
        for case, (losses, norms, weights) in zip(CASES, answers, strict=True):
            expected_losses, expected_norms, expected = toy.train_plainly(toy.run_config(**case), COUNTS, size=2)
            assert losses == pytest.approx(expected_losses, rel=1e-5), case
            assert norms == pytest.approx(expected_norms, rel=1e-5), case
            for name, weight in expected.items():
                torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=2e-6, msg=f"{case} {name}")
