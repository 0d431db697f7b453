"""The FLOP formulas agree with a count of the products that ran."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron.config.model import ModelConfig
from megatron.model.flops import model_flops_per_token
from tests.model.tiny import LLAMA, random_tokens, tiny_gpt

SEQUENCE, BATCH = 16, 2


def counted_flops(model) -> int:
    tokens = random_tokens(BATCH, SEQUENCE + 1)
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], labels=tokens[:, 1:]).backward()
    return counter.get_total_flops()


changes = pytest.mark.parametrize("changes", [{}, LLAMA, {**LLAMA, "kv_channels": 16, "num_key_value_heads": 4}])


@changes
def test_model_flops_equal_the_counted_products(changes):
    model = tiny_gpt(backend="unfused", **changes)
    expected = model_flops_per_token(model.config, model.padded_vocab_size, SEQUENCE)
    assert counted_flops(model) == expected * SEQUENCE * BATCH


def test_the_causal_count_halves_attention_alone():
    model = tiny_gpt()
    full, causal = (
        model_flops_per_token(model.config, model.padded_vocab_size, SEQUENCE, causal=causal)
        for causal in (False, True)
    )
    assert full - causal == 6 * 3 * 32 * SEQUENCE


def test_the_published_1_3b_count():
    """24 layers of 2048, sequence 2048, vocabulary 50304: 6 N + 12 L h S with N = 12 L h^2 + v h."""
    config = ModelConfig(num_layers=24, hidden_size=2048, num_attention_heads=16)
    weights = 12 * 24 * 2048**2 + 50304 * 2048
    assert model_flops_per_token(config, 50304, 2048) == 6 * weights + 12 * 24 * 2048 * 2048
