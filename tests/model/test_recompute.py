"""Recompute of a whole model: the same gradients under every policy, and what is held in memory between the passes."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.model.recompute_flops import UnitShape, kept_products
from megatron.parallel.groups import Group, ParallelGroups
from megatron.parallel.recompute import FULL, NONE, RecomputePolicy
from tests.model.tiny import LLAMA, random_tokens, tiny_gpt

SEQUENCE, BATCH, HIDDEN = 16, 2, 32
TOKENS = SEQUENCE * BATCH

DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.2}
SELECTIVE = RecomputePolicy(granularity="selective")
POLICIES = {
    "full": FULL,
    "units of two": RecomputePolicy(granularity="full", num_layers=2),
    "one unit": RecomputePolicy(granularity="full", num_layers=5),
    "first block": RecomputePolicy(granularity="full", method="block", num_layers=1),
    "on the host": RecomputePolicy(granularity="full", on_host=True),
    "selective": SELECTIVE,
    "products": RecomputePolicy(granularity="products", budget_bytes=30_000),
    "products of two": RecomputePolicy(granularity="products", num_layers=2, budget_bytes=60_000),
    "products of the first two": RecomputePolicy(
        granularity="products", method="block", num_layers=2, budget_bytes=9_000
    ),
}
VARIANTS = {
    "gpt2": {},
    "mlp in chunks": {"mlp_chunk_size": 12},
    "llama": {**LLAMA, "qk_layernorm": True},
    "fp32 residual": {"fp32_residual_connection": True},
}


def gradients(model, steps=2):
    """Loss and gradients of the last step: kept products depend on what the first one showed."""
    tokens = random_tokens(BATCH, SEQUENCE + 1)
    torch.manual_seed(5)
    for _ in range(steps):
        model.zero_grad()
        loss = model(tokens[:, :-1], labels=tokens[:, 1:])
        loss.backward()
    return [loss.detach(), *(param.grad for param in model.parameters()), torch.rand(3)]


@pytest.mark.parametrize("backend", ["sdpa", "unfused"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_policy_gives_the_same_gradients_with_dropout_on(variant, backend):
    changes = {**variant, **DROPOUT, "backend": backend}
    expected = gradients(tiny_gpt(**changes))
    for name, policy in POLICIES.items():
        found = gradients(tiny_gpt(recompute_policy=policy, **changes))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), name


class Made(TorchDispatchMode):
    """Notes the storage of every tensor that is made, but for views of weights, without keeping it alive."""

    def __init__(self, model):
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_alive(self):
        gc.collect()
        return sum(size for storage, size in self.made.values() if not storage.expired())


def bytes_held(policy, num_layers=3, dtype=torch.float32, **changes):
    """Bytes that a forward pass leaves for backward; hooks, such as those of recompute, hide none of them."""
    model, tokens = tiny_gpt(recompute_policy=policy, num_layers=num_layers, **changes), random_tokens(BATCH, SEQUENCE)
    model.to(dtype)
    model(tokens).sum().backward()  # what is made once, such as tables and masks, is there after this
    with Made(model) as made:
        loss = model(tokens, labels=tokens)
    held = made.bytes_alive()
    loss.backward()
    return held


def bytes_of_a_block(policy, **changes):
    """Bytes that each further block holds: four blocks less two."""
    more, fewer = (bytes_held(policy, num_layers, **changes) for num_layers in (4, 2))
    return (more - fewer) // 2


def formula(config, policy=NONE, *, backend="sdpa", mlp_chunk_size=0):
    """Bytes that docs/recompute.md gives for a block in one micro-batch, in fp32 on one rank of CPUs.

    There a dropout mask takes as much as what it is applied to, and RMSNorm is no single kernel and keeps one more
    tensor than LayerNorm.
    """
    hidden, heads, inner, itemsize = config.hidden_size, config.num_attention_heads, config.ffn_hidden_size, 4
    query, key = heads * config.kv_channels, config.num_key_value_heads * config.kv_channels
    if policy.granularity == "full":
        return TOKENS * hidden * itemsize // policy.num_layers
    norm = 2 * hidden + 2 if config.normalization == "layernorm" else 3 * hidden + 1
    rotated = config.position_embedding_type == "rope"
    products = query + 2 * key + query * (rotated or key < query) + key * rotated
    weights_kept = 1 if config.attention_dropout == 0 else 3
    core = heads if backend == "sdpa" else weights_kept * heads * SEQUENCE
    mask_bytes = 0 if backend == "sdpa" else SEQUENCE * SEQUENCE
    if policy.recomputes_attention:
        core = mask_bytes = 0
    mlp = 0 if mlp_chunk_size else (4 if config.gated else 2) * inner
    dropout = 2 * hidden if config.hidden_dropout else 0
    return TOKENS * itemsize * (2 * norm + products + core + query + mlp + dropout) + mask_bytes


@pytest.mark.parametrize(
    ("backend", "dropout"), [("sdpa", {}), ("unfused", {}), ("unfused", DROPOUT)], ids=["fused", "unfused", "dropout"]
)
@pytest.mark.parametrize("variant", [{}, LLAMA], ids=["gpt2", "llama"])
def test_what_a_block_holds_is_what_the_formula_says(variant, backend, dropout):
    changes = {**variant, **dropout, "backend": backend}
    config = tiny_gpt(**changes).config
    for policy in (NONE, SELECTIVE, FULL, POLICIES["units of two"]):
        assert bytes_of_a_block(policy, **changes) == formula(config, policy, backend=backend), policy


@pytest.mark.parametrize("variant", [{}, LLAMA], ids=["gpt2", "llama"])
def test_an_mlp_in_chunks_holds_its_input_alone(variant):
    config, chunked = tiny_gpt(**variant).config, {"mlp_chunk_size": 12}
    for policy in (NONE, SELECTIVE, FULL):
        assert bytes_of_a_block(policy, **variant, **chunked) == formula(config, policy, **chunked), policy


def test_half_precision_holds_what_the_published_formula_says():
    """34 h without the 2 h of dropout masks; on CPUs a norm's statistics are in half precision as well, 2 x 4 bytes."""
    heads, around = 4, 32 * HIDDEN + 8
    half = {"dtype": torch.bfloat16}
    assert bytes_of_a_block(NONE, **half) == TOKENS * (around + 4 * heads)
    assert bytes_of_a_block(SELECTIVE, **half) == TOKENS * around
    unfused = TOKENS * (around + (4 + 2) * heads * SEQUENCE) + SEQUENCE * SEQUENCE
    assert bytes_of_a_block(NONE, backend="unfused", **half) == unfused


def test_each_policy_holds_less_than_the_next():
    changes = {**DROPOUT, "backend": "unfused"}
    held = [bytes_held(policy, **changes) for policy in (FULL, POLICIES["products"], SELECTIVE, NONE)]
    assert held == sorted(set(held))
    first_block = bytes_held(POLICIES["first block"], **changes)
    assert first_block == held[0] + 2 * (formula(tiny_gpt(**changes).config, backend="unfused") - TOKENS * HIDDEN * 4)


@pytest.mark.parametrize(("backend", "attention"), [("sdpa", "fused"), ("unfused", "written out")])
@pytest.mark.parametrize("budget_bytes", [5_000, 12_000, 30_000, 100_000])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mlp_chunk_size", [0, 12])
def test_products_hold_what_was_planned_for_them(backend, attention, budget_bytes, dropout, mlp_chunk_size):
    changes = {**LLAMA, "backend": backend, "hidden_dropout": dropout}
    policy = RecomputePolicy(granularity="products", budget_bytes=budget_bytes)
    changes["mlp_chunk_size"] = mlp_chunk_size
    shape = UnitShape(tokens=TOKENS, seq_length=SEQUENCE, itemsize=4, attention=attention, mlp_chunk=mlp_chunk_size)
    planned = sum(p.num_bytes for p in kept_products(tiny_gpt(**changes).config, shape, 1, budget_bytes).values())
    assert 0 < planned <= budget_bytes
    assert bytes_held(policy, **changes) == bytes_held(FULL, **changes) + 3 * planned


@pytest.mark.usefixtures("other_ranks_are_like_this_one")
def test_divided_inputs_take_their_share():
    tensor = Group(ranks=(0, 1), rank=0, handle=None)
    whole, divided = (
        bytes_of_a_block(
            RecomputePolicy(granularity="full", split_over=split_over),
            groups=replace(ParallelGroups.alone(), tensor=tensor),
        )
        for split_over in (Group.alone(), tensor)
    )
    assert whole == TOKENS * HIDDEN * 4
    assert divided == whole // 2
