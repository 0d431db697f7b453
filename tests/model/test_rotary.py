"""Rotary frequencies: the scalings that other modules do not check (those are in the Hugging Face parity tests)."""

import math
from decimal import Decimal, localcontext

import torch

from megatron.model.context import Context
from megatron.model.rotary import rotary_frequencies, rotary_tables
from tests.model.tiny import LLAMA, tiny_config, tiny_gpt

TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875")


def frequencies(**changes):
    return rotary_frequencies(tiny_config(**{**LLAMA, "kv_channels": 64, **changes}))


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest_by_the_factor():
    plain = frequencies()
    scaled = frequencies(rotary_scaling_type="ntk", rotary_scaling_factor=8.0)
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)
    stretch = plain / scaled
    assert torch.all(stretch[1:] > stretch[:-1])


def test_partial_rotation_has_frequencies_of_its_own_size():
    assert torch.equal(frequencies(rotary_percent=0.25), frequencies(kv_channels=16))


def test_tables_are_made_once_and_in_fp32():
    first = rotary_tables((1.0, 0.1), 2.0, 32, torch.device("cpu"))
    assert rotary_tables((1.0, 0.1), 2.0, 32, torch.device("cpu")) is first
    assert rotary_tables((1.0, 0.2), 2.0, 32, torch.device("cpu")) is not first
    angles = torch.arange(32.0)[:, None] * torch.tensor([1.0, 0.1])
    torch.testing.assert_close(first, (2 * angles.cos(), 2 * angles.sin()))
    assert {table.dtype for table in first} == {torch.float32}


def test_tables_are_exact_at_a_million_tokens():
    """To the rounding of fp32, of angles that Python's own integers and decimals give: pos / base^(2 i / size)."""
    size, length = 64, 2**20
    cos, sin = rotary_tables(tuple(frequencies().tolist()), 1.0, length, torch.device("cpu"))
    with localcontext(prec=50):
        for position in (1, 4095, 131_071, length - 2, length - 1):
            for pair in range(size // 2):
                turns = position / Decimal(10_000) ** (Decimal(2 * pair) / size) / TWO_PI
                angle = float((turns - int(turns)) * TWO_PI)
                assert abs(cos[position, pair].item() - math.cos(angle)) < 1e-7, (position, pair)
                assert abs(sin[position, pair].item() - math.sin(angle)) < 1e-7, (position, pair)


def test_a_compiled_block_takes_the_tables_as_constants():
    block = tiny_gpt(**LLAMA).stages()[2]
    explained = torch._dynamo.explain(block)(torch.randn(16, 2, 32), Context())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    assert not any("arange" in graph.code or ".cos(" in graph.code for graph in explained.graphs)
