"""From the flags of recompute to the policy of each pipeline stage, and what is told of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.config.data import DataConfig
from megatron.config.errors import ConfigError
from megatron.config.kernels import KernelsConfig
from megatron.config.model import ModelConfig
from megatron.config.training import TrainingConfig
from megatron.model.recompute_flops import UnitShape, unit_products
from megatron.parallel.groups import Group, ParallelGroups
from megatron.parallel.recompute_products import ProductBudget
from megatron.training.recompute import (
    GIB,
    attention_in_products,
    build_recompute,
    counted_keys,
    micro_batches_in_flight,
    unit_budget_bytes,
    unit_shape,
)
from tests.model.tiny import backend_called

MODEL = ModelConfig(num_layers=8, hidden_size=1024, num_attention_heads=16, hidden_dropout=0.0)
SHAPE = UnitShape(tokens=4096, seq_length=2048)
INPUT_BYTES = 4096 * 1024 * 2
TENSOR = Group(ranks=(0, 1), rank=0, handle=None)


def build(stage_blocks=(8,), *, shape=SHAPE, model=MODEL, sequence_parallel=False, micro_batches=4, **kernels):
    return build_recompute(
        KernelsConfig(**kernels),
        model,
        shape,
        stage_blocks=stage_blocks,
        num_micro_batches=micro_batches,
        tensor=TENSOR,
        sequence_parallel=sequence_parallel,
    )


@pytest.mark.parametrize(
    ("stage", "stages", "micro_batches", "in_flight"),
    [(0, 1, 16, 1), (0, 4, 16, 4), (1, 4, 16, 3), (3, 4, 16, 1), (0, 4, 2, 2), (2, 4, 2, 2), (3, 4, 2, 1)],
)
def test_a_stage_holds_a_micro_batch_for_each_stage_behind_it_and_its_own(stage, stages, micro_batches, in_flight):
    assert micro_batches_in_flight(stage, stages, micro_batches) == in_flight


@pytest.mark.parametrize(("num_units", "stage", "share"), [(4, 0, 16), (4, 3, 4), (1, 0, 4), (24, 1, 72)])
def test_a_budget_is_divided_over_units_and_micro_batches_in_flight(num_units, stage, share):
    place = {"num_units": num_units, "stage": stage, "num_stages": 4}
    found = unit_budget_bytes(1.5, num_micro_batches=8, **place)
    assert found == int(1.5 * GIB) // share
    assert unit_budget_bytes(1.5, num_micro_batches=1, **place) == int(1.5 * GIB) // num_units


def test_a_stage_that_recomputes_nothing_has_no_budget():
    assert unit_budget_bytes(1.5, num_units=0, stage=0, num_stages=1, num_micro_batches=8) == 0


def test_every_stage_has_a_budget_of_its_own_and_the_policy_of_the_flags():
    flags = {"recompute_method": "block", "recompute_num_layers": 2, "distribute_saved_activations": True}
    recompute = build(
        (3, 4, 1), recompute_granularity="products", recompute_budget_gib=1.0, recompute_inputs_on_host=True, **flags
    )
    assert [policy.budget_bytes for policy in recompute.policies] == [GIB // (2 * 3), GIB // (2 * 2), GIB]
    for policy in recompute.policies:
        assert (policy.granularity, policy.method, policy.num_layers) == ("products", "block", 2)
        assert policy.on_host
        assert policy.split_over is TENSOR


def test_recompute_is_off_unless_it_is_asked_for():
    recompute = build()
    assert recompute.describe() is None
    assert recompute.flops_per_token() == 0


def test_flops_of_all_stages_are_those_of_the_model():
    whole, parts = (build(blocks, recompute_granularity="full") for blocks in ((8,), (5, 3)))
    assert whole.flops_per_token() == parts.flops_per_token() > 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"recompute_granularity": "full", "recompute_num_layers": 2},
            " recompute: 8 blocks in units of 2; kept: their inputs (0.03 GiB)",
        ),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
            " recompute: 3 of 8 blocks; kept: their inputs (0.02 GiB), and all of the others",
        ),
        (
            {
                "recompute_granularity": "full",
                "distribute_saved_activations": True,
                "recompute_inputs_on_host": True,
                "stage_blocks": (4, 4),
            },
            " recompute: 4 blocks of the first stage; kept: their inputs in the host's memory, divided over 2 tensor "
            "ranks (0.03 GiB)",
        ),
        (
            {"recompute_granularity": "products", "recompute_budget_gib": 0.4},
            " recompute: 8 blocks; kept: their inputs (0.06 GiB), and of their products attention, qkv, attention "
            "output (0.31 GiB)",
        ),
        (
            {"recompute_granularity": "selective", "shape": UnitShape(tokens=4, seq_length=2, attention="written out")},
            " recompute: the core of attention in 8 blocks; kept: its queries, keys and values, and all around it",
        ),
    ],
)
def test_what_is_recomputed_and_kept_is_told_once(flags, sentence):
    assert build(**flags).describe() == sentence


def test_it_is_told_when_selective_recompute_has_little_to_save():
    sentence = build(recompute_granularity="selective").describe()
    assert sentence.endswith("; this kernel keeps no s x s weights, so that little is saved")


@pytest.mark.parametrize(
    ("backend", "dropout", "seen"),
    [
        ("sdpa", 0.0, "fused"),
        ("sdpa_flash", 0.0, "fused"),
        ("sdpa_cudnn", 0.1, "opaque"),
        ("flash_triton", 0.0, "fused"),
        ("flash_triton", 0.1, "fused"),
        ("unfused", 0.1, "written out"),
        ("flash_v2", 0.0, "opaque"),
        ("flash_v4", 0.0, "fused"),
    ],
)
def test_a_backend_says_whether_its_result_is_among_the_products_that_may_be_kept(backend, dropout, seen):
    assert attention_in_products(backend_called(backend), dropout) == seen


@pytest.mark.parametrize(
    ("backend", "window", "documents", "keys"),
    [
        ("sdpa", 0, False, 32),
        ("sdpa", 16, False, 64),
        ("sdpa", 64, False, 32),
        ("sdpa", 0, True, 64),
        ("flash_triton", 16, True, 14),
        ("flash_triton", 0, True, 32),
    ],
)
def test_keys_are_counted_as_the_formulas_of_backends_count_them(backend, window, documents, keys):
    model = ModelConfig(num_layers=1, hidden_size=64, num_attention_heads=4, attention_window=window)
    data = DataConfig(seq_length=64, reset_attention_mask=documents)
    assert counted_keys(model, data, backend_called(backend)) == keys


@pytest.mark.parametrize("changes", [{}, {"attention_window": 128}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize(("backend", "dropout"), [("flash_triton", 0.0), ("flash_triton", 0.1), ("flash_v4", 0.0)])
def test_the_product_that_recompute_sees_is_the_planned_one(backend, changes, dropout):
    model = ModelConfig(num_layers=1, hidden_size=512, num_attention_heads=8, attention_dropout=dropout, **changes)
    shape = unit_shape(
        model,
        TrainingConfig(micro_batch_size=2),
        DataConfig(seq_length=1024),
        ParallelGroups.alone(),
        backend_called(backend),
        2,
    )
    (planned,) = [product for product in unit_products(model, shape, 1).values() if product.result == "attention"]
    seen = []
    budget = ProductBudget(0)
    budget.choose = lambda products, total: seen.extend(products.values()) or {}
    with FakeTensorMode(), budget.contexts()[0]:
        query = torch.empty(1024, 2, 8, 64, dtype=torch.bfloat16)
        key = torch.empty(1024, 2, model.num_key_value_heads, 64, dtype=torch.bfloat16)
        backend_called(backend).attend(
            query, key, key, scale=0.125, causal=True, dropout=dropout, window=model.attention_window
        )
    (product,) = seen
    assert product.num_bytes == planned.num_bytes
    assert product.flops == pytest.approx(planned.flops, rel=0.01)  # the diagonal is counted whole


def test_inputs_are_counted_as_a_rank_holds_them():
    assert build().input_bytes == INPUT_BYTES
    assert build(sequence_parallel=True).input_bytes == INPUT_BYTES // 2
    assert build(recompute_granularity="full", distribute_saved_activations=True).input_bytes == INPUT_BYTES // 2
    fp32 = ModelConfig(num_layers=8, hidden_size=1024, num_attention_heads=16, fp32_residual_connection=True)
    assert build(model=fp32).input_bytes == 2 * INPUT_BYTES


def test_inputs_on_the_host_are_pinned_for_all_that_wait_at_a_time():
    on_host = {"recompute_granularity": "full", "recompute_inputs_on_host": True}
    assert build(**on_host).host_bytes(0) == 8 * INPUT_BYTES
    odd = UnitShape(tokens=4096 + 1024, seq_length=1024)
    assert build(shape=odd, **on_host).host_bytes(0) == 8 * 2 * INPUT_BYTES  # the next power of two
    stages = build((4, 4), **on_host)
    assert [stages.host_bytes(stage) for stage in (0, 1)] == [4 * 2 * INPUT_BYTES, 4 * INPUT_BYTES]
    assert build(recompute_granularity="full").host_bytes(0) == 0


def test_a_budget_that_holds_no_product_is_refused_with_the_numbers():
    with pytest.raises(ConfigError) as caught:
        build((4, 4), recompute_granularity="products", recompute_budget_gib=0.05)
    assert len(caught.value.messages) == 1
    for part in ("--recompute-budget-gib 0.05", f"{int(0.05 * GIB) // 8:,} bytes", "4 recomputed units x 2 micro"):
        assert part in str(caught.value)
