"""The engine on a GPU: every ZeRO stage and precision against plain torch, host optimizer, skipped steps, resume."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.engine import toy
from tests.ranks import run_on_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

COUNTS = [4, 2, 4]
CASES = [
    {"stage": stage, "precision": precision, "optimizer": optimizer, "cpu_optimizer": offload}
    for precision, stage, offload in itertools.product(("fp32", "bf16", "fp16"), range(4), (False, True))
    for optimizer in ("sgd", "adam")
    if stage > 0 or (precision == "fp32" and not offload)
]
WEIGHTS_ON_HOST = [
    {"stage": 3, "precision": precision, "optimizer": "sgd", "cpu_optimizer": offload, "remote_device": "cpu"}
    for precision, offload in itertools.product(("fp32", "bf16", "fp16"), (False, True))
]


def step(engine, index):
    size = dist.get_world_size()
    batches = toy.make_batches(index, dist.get_rank(), size, COUNTS[index % 3] // size)
    result = engine.train_step(batches, toy.rate(index), 0.1)
    return result.loss.item(), result.grad_norm.item(), result.skipped


def go_through(case, folder):
    """Three steps, then a poisoned one, a save, two more; and the two more again from the checkpoint."""
    config = toy.run_config(clip_grad=0.5, initial_loss_scale=64.0, **case)
    engine = toy.build_engine(config)
    steps = [step(engine, index) for index in range(3)]
    weights = {name: weight.cpu() for name, weight in toy.full_weights(engine).items()}
    engine.module.poison = math.nan if dist.get_rank() == 0 else 0.0
    poisoned = step(engine, 3)
    unchanged = all(torch.equal(weight.cpu(), weights[name]) for name, weight in toy.full_weights(engine).items())
    directory = Path(folder) / "-".join(map(str, case.values())) / "step4"
    toy.save(engine, directory)
    straight = [step(engine, index) for index in (4, 5)]
    engine.close()
    engine = toy.build_engine(config)
    toy.load(engine, directory)
    resumed = [step(engine, index) for index in (4, 5)]
    engine.close()
    return steps, weights, poisoned[2] and unchanged, straight, resumed


def go_through_all(cases, folder):
    torch.backends.cuda.matmul.allow_tf32 = False
    return [go_through(case, folder) for case in cases]


@pytest.mark.parametrize("cases", [CASES, WEIGHTS_ON_HOST], ids=["every stage", "weights on the host"])
def test_every_stage_and_precision_on_every_gpu_there_is(cases, tmp_path):
    size = min(2, torch.cuda.device_count())
    for answers in run_on_ranks(
        size, go_through_all, cases, str(tmp_path), backend="nccl", deepspeed=True, timeout=400
    ):
        for case, (steps, weights, skipped, straight, resumed) in zip(cases, answers, strict=True):
            half = case["precision"] != "fp32"
            config = toy.run_config(clip_grad=0.5, **case)
            losses, norms, expected = toy.train_plainly(config, COUNTS, size=1)
            assert [loss for loss, _, _ in steps] == pytest.approx(losses, rel=5e-2 if half else 1e-4), case
            assert [norm for _, norm, _ in steps] == pytest.approx(norms, rel=5e-2 if half else 1e-4), case
            if not half or case["optimizer"] == "sgd":  # Adam's first steps turn on the sign of gradients near zero
                for name, weight in expected.items():
                    torch.testing.assert_close(weights[name], weight, rtol=2e-2, atol=1e-2 if half else 1e-4)
            assert skipped, case
            assert [loss for loss, _, _ in straight] == [loss for loss, _, _ in resumed], case
            assert straight == resumed, case
