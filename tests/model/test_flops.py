"""The FLOP formulas agree with a count of the products that ran."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron.config.model import ModelConfig
from megatron.model.flops import matmul_parameters, model_flops_per_token
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


@pytest.mark.parametrize("window", [1, 5, SEQUENCE, 2 * SEQUENCE])
def test_a_window_counts_the_keys_that_it_leaves(window):
    model = tiny_gpt(attention_window=window)
    plain = tiny_gpt()
    seen = sum(min(i + 1, window) for i in range(SEQUENCE))
    causal = model_flops_per_token(model.config, model.padded_vocab_size, SEQUENCE, causal=True)
    products = 6 * matmul_parameters(plain.config, plain.padded_vocab_size)
    # The diagonal is counted by half, as in the usual s^2 / 2.
    counted = seen - min(window, SEQUENCE) / 2
    assert causal - products == pytest.approx(12 * 3 * 32 * counted / SEQUENCE)


def test_the_published_1_3b_count():
    """24 layers of 2048, sequence 2048, vocabulary 50304: 6 N + 12 L h S with N = 12 L h^2 + v h."""
    config = ModelConfig(num_layers=24, hidden_size=2048, num_attention_heads=16)
    weights = 12 * 24 * 2048**2 + 50304 * 2048
    assert model_flops_per_token(config, 50304, 2048) == 6 * weights + 12 * 24 * 2048 * 2048
