"""Recompute around blocks that torch.compile has translated."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from megatron.parallel.recompute import FULL, RecomputePolicy
from tests.model.test_recompute import DROPOUT, SELECTIVE, gradients
from tests.model.tiny import LLAMA, tiny_gpt

PRODUCTS = RecomputePolicy(granularity="products", budget_bytes=30_000)


def gradients_of_compiled_blocks(policy):
    """Loss and gradients, and how many graphs were translated; without inductor, which reorders sums."""
    graphs = []

    def translate(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    model = tiny_gpt(recompute_policy=policy, num_layers=2, **LLAMA, **DROPOUT)
    for stage in model.stages()[2:4]:
        stage.compile(backend=translate)
    return gradients(model), len(graphs)


@pytest.mark.parametrize(("policy", "is_translated"), [(FULL, True), (SELECTIVE, True), (PRODUCTS, False)])
def test_recompute_of_compiled_blocks_changes_no_gradient(policy, is_translated):
    """Up to the order in which a translated graph adds gradients up.

    With kept products the blocks run untranslated: torch translates nothing while operations are watched.
    """
    expected = gradients(tiny_gpt(num_layers=2, **LLAMA, **DROPOUT))
    found, graphs = gradients_of_compiled_blocks(policy)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual - wanted).norm() <= 1e-6 * wanted.norm()
    assert (graphs > 0) == is_translated
