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
OFFLOADED = [{"stage": 3, "remote_device": "cpu", "cpu_optimizer": optimizer} for optimizer in (False, True)]


HALF_CASES = [
    {"stage": stage, "precision": precision, "optimizer": "sgd", "clip_grad": 0.05, **options}
    for precision, stage in itertools.product(("bf16", "fp16"), (1, 2, 3))
    for options in ({}, {"cpu_optimizer": True}, {"accumulate_allreduce_grads_in_fp32": False})
] + [
    {"precision": precision, "optimizer": "sgd", "clip_grad": 0.05, **offloaded}
    for precision, offloaded in itertools.product(("bf16", "fp16"), OFFLOADED)
]


def train(cases):
    toy.pretend_fp16_works()
    rank, size = dist.get_rank(), dist.get_world_size()
    results = []
    for case in cases:
        engine = toy.build_engine(toy.run_config(initial_loss_scale=64.0, **case))
        losses, norms = [], []
        for step, count in enumerate(COUNTS):
            result = engine.train_step(toy.make_batches(step, rank, size, count * 2 // size), toy.rate(step), 0.1)
            assert not result.skipped
            assert result.loss_scale == (64.0 if case.get("precision") == "fp16" else 1.0)
            losses.append(result.loss.item())
            norms.append(result.grad_norm.item())
        results.append((losses, norms, toy.full_weights(engine)))
        engine.close()
    return results


@pytest.mark.parametrize(
    ("size", "cases"), [(1, CASES), (2, CASES + OFFLOADED + HALF_CASES)], ids=["alone", "two ranks"]
)
def test_every_zero_stage_equals_plain_torch(size, cases):
    for answers in run_on_ranks(size, train, cases, deepspeed=True):
        for case, (losses, norms, weights) in zip(cases, answers, strict=True):
            half = "precision" in case
            expected_losses, expected_norms, expected = toy.train_plainly(toy.run_config(**case), COUNTS, size=2)
            assert losses == pytest.approx(expected_losses, rel=5e-3 if half else 1e-5), case
            assert norms == pytest.approx(expected_norms, rel=2e-2 if half else 1e-5), case
            tolerance = {"rtol": 1e-2, "atol": 2e-3} if half else {"rtol": 1e-5, "atol": 2e-6}
            for name, weight in expected.items():
                torch.testing.assert_close(
                    weights[name], weight, **tolerance, msg=lambda text, where=f"{case} {name}": f"{where}: {text}"
                )
