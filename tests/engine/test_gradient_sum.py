"""Gradients of bf16 weights are summed in fp32 in one pass: the same bits as by DeepSpeed, and none of them kept."""

import torch

from tests.engine import toy
from tests.ranks import run_on_ranks


def train(own_sums):
    engine = toy.build_engine(toy.run_config(stage=1, precision="bf16"))
    optimizer = engine._engine.optimizer
    if not own_sums:
        del optimizer.update_hp_grads  # back to DeepSpeed's
    kept = []
    clear = optimizer.clear_lp_grads

    def watched(*args, **kwargs):
        kept.append(sum(weight.grad is not None for group in optimizer.bf16_groups for weight in group))
        clear(*args, **kwargs)

    optimizer.clear_lp_grads = watched
    norms = [float(engine.train_step(toy.make_batches(step, 0, 1, 3), 0.1, 0.1).grad_norm) for step in range(3)]
    weights = toy.full_weights(engine)
    engine.close()
    return norms, weights, kept


def train_both_ways():
    (norms, weights, kept), (own_norms, own_weights, own_kept) = train(own_sums=False), train(own_sums=True)
    assert own_norms == norms
    assert all(torch.equal(own_weights[name], weight) for name, weight in weights.items())
    return max(kept), max(own_kept)


def test_sums_are_deepspeeds_bit_for_bit_and_no_gradient_is_kept_to_be_zeroed():
    ((kept, own_kept),) = run_on_ranks(1, train_both_ways, deepspeed=True)
    assert kept > 0, "DeepSpeed frees gradients by itself now"
    assert own_kept == 0
