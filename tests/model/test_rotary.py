"""Rotary frequencies: the scalings that other modules do not check (those are in the Hugging Face parity tests)."""

import torch

from megatron.model.rotary import Rotary, frequencies, rotary_tables
from tests.model.tiny import LLAMA, tiny_config


def rotary(**changes) -> Rotary:
    return Rotary.from_config(tiny_config(**{**LLAMA, "kv_channels": 64, **changes}))


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest_by_the_factor():
    plain = frequencies(rotary())
    scaled = frequencies(rotary(rotary_scaling_type="ntk", rotary_scaling_factor=8.0))
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)
    stretch = plain / scaled
    assert torch.all(stretch[1:] > stretch[:-1])


def test_partial_rotation_has_frequencies_of_its_own_size():
    torch.testing.assert_close(
        frequencies(rotary(rotary_percent=0.25)), frequencies(rotary(kv_channels=16)), rtol=0, atol=0
    )


def test_tables_are_made_once_for_a_length_and_device():
    first = rotary_tables(rotary(), 32, torch.device("cpu"))
    assert rotary_tables(rotary(), 32, torch.device("cpu")) is first
    assert rotary_tables(rotary(rotary_base=5.0), 32, torch.device("cpu")) is not first
    assert {table.dtype for table in first} == {torch.float32}
