"""Rotary frequencies: the scalings that other modules do not check (those are in the Hugging Face parity tests)."""

import torch

from megatron.model.context import Context
from megatron.model.rotary import rotary_frequencies, rotary_tables
from tests.model.tiny import LLAMA, tiny_config, tiny_gpt


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


def test_a_compiled_block_takes_the_tables_as_constants():
    block = tiny_gpt(**LLAMA).stages()[2]
    explained = torch._dynamo.explain(block)(torch.randn(16, 2, 32), Context())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    assert not any("arange" in graph.code or ".cos(" in graph.code for graph in explained.graphs)
