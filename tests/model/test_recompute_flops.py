"""What recompute is said to repeat agrees with a count of the products that ran."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron.model.flops import attention_flops
from megatron.model.gpt import GPT
from megatron.model.init import initialize_parameters
from megatron.model.recompute_flops import UnitShape, kept_products, recomputed_flops_per_token, unit_products
from megatron.parallel.groups import create_groups
from megatron.parallel.mesh import Mesh
from megatron.parallel.recompute import FULL, NONE, RecomputePolicy
from megatron.parallel.recompute_products import ProductBudget
from tests.model.tiny import LLAMA, VOCAB_SIZE, backend_called, random_tokens, tiny_config, tiny_gpt
from tests.ranks import run_on_ranks

SEQUENCE, BATCH = 16, 2
TOKENS = SEQUENCE * BATCH


def counted_flops(policy, **changes):
    """FLOPs of the second step: what products are kept depends on how far recompute went in the first."""
    model, tokens = tiny_gpt(recompute_policy=policy, **changes), random_tokens(BATCH, SEQUENCE + 1)
    for _ in range(2):
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            model(tokens[:, :-1], labels=tokens[:, 1:]).backward()
    return counter.get_total_flops()


def forward_flops(query_shape, key_shape, *_, **__):
    batch, heads, length, size = query_shape
    return 4 * batch * heads * length * size * key_shape[2]


def backward_flops(_, query_shape, key_shape, *__, **___):
    return 2 * forward_flops(query_shape, key_shape)


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
}
"""torch counts the kernel of GPUs alone. Every query is counted with every key."""

changes = pytest.mark.parametrize("changes", [{}, LLAMA, {**LLAMA, "kv_channels": 16, "num_key_value_heads": 4}])
chunks = pytest.mark.parametrize("mlp_chunk", [0, 12])
dropouts = pytest.mark.parametrize("dropout", [0.0, 0.1])


def repeated(policy, *, backend, mlp_chunk=0, **changes):
    """FLOPs beyond those of a plain run."""
    again = counted_flops(policy, backend=backend, mlp_chunk_size=mlp_chunk, **changes)
    return again - counted_flops(NONE, backend=backend, **changes)


def planned(policy, shape=None, **changes):
    config = tiny_config(**changes)
    return TOKENS * recomputed_flops_per_token(config, SEQUENCE, config.num_layers, policy, shape)


@changes
@dropouts
@chunks
@pytest.mark.parametrize(("method", "num_layers"), [("uniform", 1), ("uniform", 2), ("block", 1), ("block", 2)])
def test_recomputed_flops_equal_the_counted_ones(changes, dropout, mlp_chunk, method, num_layers):
    policy = RecomputePolicy(granularity="full", method=method, num_layers=num_layers)
    changes = {**changes, "hidden_dropout": dropout}
    shape = UnitShape(tokens=TOKENS, seq_length=SEQUENCE, itemsize=4, mlp_chunk=mlp_chunk)
    assert repeated(policy, backend="unfused", mlp_chunk=mlp_chunk, **changes) == planned(policy, shape, **changes) > 0


@changes
def test_selective_recompute_repeats_a_fused_core_whole_and_the_first_product_of_one_written_out(changes):
    policy = RecomputePolicy(granularity="selective")
    assert repeated(policy, backend="sdpa", **changes) == planned(policy, **changes)
    assert repeated(policy, backend="unfused", **changes) == planned(policy, **changes) / 2


@changes
@dropouts
@chunks
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("backend", "attention"), [("sdpa", "fused"), ("unfused", "written out")])
def test_flops_with_kept_products_equal_the_counted_ones(changes, dropout, mlp_chunk, num_layers, backend, attention):
    shape = UnitShape(tokens=TOKENS, seq_length=SEQUENCE, itemsize=4, attention=attention, mlp_chunk=mlp_chunk)
    changes = {**changes, "hidden_dropout": dropout}
    found = []
    for budget in (5_000, 20_000, 45_000, 200_000):
        policy = RecomputePolicy(granularity="products", num_layers=num_layers, budget_bytes=budget)
        found.append(repeated(policy, backend=backend, mlp_chunk=mlp_chunk, **changes))
        assert found[-1] == planned(policy, shape, **changes), budget
    assert found == sorted(found, reverse=True)
    config = tiny_config(**changes)
    up = 2 * config.hidden_size * config.ffn_hidden_size * (2 if config.gated else 1)
    assert found[0] > found[-1] == (TOKENS * config.num_layers * up if mlp_chunk else 0)


def products_seen(in_halves):
    """FLOPs and bytes of the products of a block, as recompute sees them on a tensor rank with a shard."""
    groups, seen, choose = create_groups(Mesh(tensor=2), dist.get_rank()), [], ProductBudget.choose
    model = GPT(
        tiny_config(**LLAMA, num_layers=1),
        vocab_size=VOCAB_SIZE,
        groups=groups,
        attention=backend_called("sdpa"),
        sequence_parallel=True,
        in_halves=in_halves,
        recompute_policy=RecomputePolicy(granularity="products", budget_bytes=20_000),
    )
    initialize_parameters(model, seed=1, std=0.2, num_layers=1)
    ProductBudget.choose = lambda self, products, total: seen.append(products) or choose(self, products, total)
    model(random_tokens(BATCH, SEQUENCE))
    (products,) = seen
    return [(product.flops, product.num_bytes) for product in products.values()]


@pytest.mark.parametrize("in_halves", [False, True])
def test_products_of_a_tensor_rank_are_those_that_recompute_sees(in_halves):
    shape = UnitShape(tokens=TOKENS, seq_length=SEQUENCE, tensor_size=2, parts=2 if in_halves else 1, itemsize=4)
    planned = [(p.flops, p.num_bytes) for p in unit_products(tiny_config(**LLAMA), shape, 1).values()]
    assert run_on_ranks(2, products_seen, in_halves) == [planned] * 2


def test_nothing_is_repeated_without_recompute():
    assert planned(NONE) == 0


def test_the_causal_count_halves_attention_alone():
    config = tiny_config()
    full, causal = (recomputed_flops_per_token(config, SEQUENCE, 3, FULL, causal=causal) for causal in (False, True))
    assert full - causal == 3 * attention_flops(config, SEQUENCE, causal=True)


def test_a_long_sequence_makes_attention_the_dearest_product():
    config = tiny_config(hidden_size=64, ffn_hidden_size=256, hidden_dropout=0.1)
    for seq_length, dearest in ((16, "down"), (1024, "attention")):
        shape = UnitShape(tokens=seq_length, seq_length=seq_length)
        sizes = {product.result: product.num_bytes for product in unit_products(config, shape, 1).values()}
        kept = kept_products(config, shape, 1, max(sizes["down"], sizes["attention"]))
        assert next(iter(kept.values())).result == dearest
