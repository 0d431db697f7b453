"""A gradient that is not finite, on one rank and in one micro-batch, costs one step and nothing else."""

import itertools
import math

import torch
import torch.distributed as dist

from tests.engine import toy
from tests.ranks import run_on_ranks

CASES = [
    {"stage": stage, "precision": precision, "cpu_optimizer": offload}
    for precision, stage, offload in itertools.product(("fp32", "bf16", "fp16"), range(4), (False, True))
    if stage > 0 or (precision == "fp32" and not offload)
] + [
    {"stage": 3, "precision": precision, "cpu_optimizer": offload, "remote_device": "cpu"}
    for precision, offload in itertools.product(("fp32", "bf16", "fp16"), (False, True))
]


def train(case, poison, poisoned_step=1):
    """Three steps of two micro-batches; without a poison the poisoned step is left out."""
    rank, size = dist.get_rank(), dist.get_world_size()
    engine = toy.build_engine(toy.run_config(clip_grad=1.0, initial_loss_scale=64.0, **case))
    results = {}
    for step in range(3):
        if step == poisoned_step and poison is None:
            continue
        if step == poisoned_step and rank == 1:
            engine.module.poison = poison
        results[step] = engine.train_step(toy.make_batches(step, rank, size, 2), toy.rate(step), 0.1)
    weights = toy.full_weights(engine)
    engine.close()
    return results, weights


def poison_every_way(cases):
    toy.pretend_fp16_works()
    problems = []
    for index, case in enumerate(cases):
        poison = (math.nan, math.inf)[index % 2]
        clean, expected = train(case, None)
        poisoned, weights = train(case, poison)
        bad = poisoned[1]
        if not bad.skipped or math.isfinite(bad.grad_norm) or not math.isfinite(bad.loss):
            problems.append(f"{case} {poison}: not skipped: {bad}")
        if poisoned[2].skipped or poisoned[2].grad_norm != clean[2].grad_norm:
            problems.append(f"{case} {poison}: the next step is not clean: {poisoned[2]}, not {clean[2]}")
        if any(not torch.equal(weights[name], expected[name]) for name in expected):
            problems.append(f"{case} {poison}: weights differ from a run without that step")
    return problems


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all_and_leaves_no_trace():
    for problems in run_on_ranks(2, poison_every_way, CASES, deepspeed=True):
        assert not problems, "\n".join(problems)
