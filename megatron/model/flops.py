"""Floating-point operations of training, counted from the shapes of the products.

Model FLOPs are those that the mathematics needs: recompute is not counted. Hardware FLOPs are those that the device
executes. One multiply-add is two; backward is twice forward. Norms, activations and the softmax are left out, as usual.
"""

from __future__ import annotations

from megatron.config.model import ModelConfig


def matmul_parameters(config: ModelConfig, padded_vocab_size: int) -> int:
    """Count the weights in matrix products: all blocks and the output head; not the embeddings, norms and biases."""
    return config.num_layers * _block_parameters(config) + padded_vocab_size * config.hidden_size


def model_flops_per_token(
    config: ModelConfig, padded_vocab_size: int, sequence_length: int, *, causal: bool = False
) -> float:
    """Count forward and backward of one token: 6 x weights + 12 x layers x (heads x head size) x sequence length.

    The second term is attention with every query reading every key; `causal` counts the half that a causal model needs.
    """
    products = 2 * matmul_parameters(config, padded_vocab_size)
    attention = config.num_layers * _attention_flops(config, sequence_length, causal=causal)
    return 3 * (products + attention)


def hardware_flops_per_token(
    config: ModelConfig,
    padded_vocab_size: int,
    sequence_length: int,
    *,
    recompute_granularity: str = "none",
    recompute_num_layers: int = 1,
    causal: bool = False,
) -> float:
    """Add what backward computes again: under "full" recompute, the forward pass of every block.

    The second pass over a unit of blocks ends as soon as backward has all it needs. Only dropout needs the output of
    the unit's last product; without it that product is not run again.
    """
    flops = model_flops_per_token(config, padded_vocab_size, sequence_length, causal=causal)
    if recompute_granularity == "full":
        block = 2 * _block_parameters(config) + _attention_flops(config, sequence_length, causal=causal)
        flops += config.num_layers * block
        if config.hidden_dropout == 0:
            num_units = -(-config.num_layers // recompute_num_layers)
            flops -= num_units * 2 * config.hidden_size * config.ffn_hidden_size
    return flops


def _block_parameters(config: ModelConfig) -> int:
    query_size = config.num_attention_heads * config.kv_channels
    key_size = config.num_key_value_heads * config.kv_channels
    attention = config.hidden_size * (query_size + 2 * key_size) + query_size * config.hidden_size
    mlp = (3 if config.gated else 2) * config.hidden_size * config.ffn_hidden_size
    return attention + mlp


def _attention_flops(config: ModelConfig, sequence_length: int, *, causal: bool) -> float:
    """Count the forward FLOPs of query x key and weights x value for one token of one block.

    A window of w tokens leaves w keys of the sequence's s; of a causal model's, w (1 - w / 2s) on average.
    """
    keys = min(sequence_length, config.attention_window or sequence_length)
    full = 4 * config.num_attention_heads * config.kv_channels * keys
    return full * (1 - keys / (2 * sequence_length)) if causal else full
