"""Floating-point operations of training, counted from the shapes of the products.

Model FLOPs are those that the mathematics needs: recompute is not counted. Hardware FLOPs are those that the device
executes: `recompute_flops.py` counts what comes on top. One multiply-add is two; backward is twice forward. Norms,
activations and the softmax are left out, as usual.
"""

from __future__ import annotations

from megatron.config.model import ModelConfig


def matmul_parameters(config: ModelConfig, padded_vocab_size: int) -> int:
    """Count the weights in matrix products: all blocks and the output head; not the embeddings, norms and biases."""
    return config.num_layers * block_parameters(config) + padded_vocab_size * config.hidden_size


def model_flops_per_token(
    config: ModelConfig, padded_vocab_size: int, sequence_length: int, *, causal: bool = False
) -> float:
    """Count forward and backward of one token: 6 x weights + 12 x layers x (heads x head size) x sequence length.

    The second term is attention with every query reading every key; `causal` counts the half that a causal model needs.
    """
    products = 2 * matmul_parameters(config, padded_vocab_size)
    attention = config.num_layers * attention_flops(config, sequence_length, causal=causal)
    return 3 * (products + attention)


def block_parameters(config: ModelConfig) -> int:
    """Count the weights in the matrix products of one block."""
    query_size = config.num_attention_heads * config.kv_channels
    key_size = config.num_key_value_heads * config.kv_channels
    attention = config.hidden_size * (query_size + 2 * key_size) + query_size * config.hidden_size
    mlp = (3 if config.gated else 2) * config.hidden_size * config.ffn_hidden_size
    return attention + mlp


def attention_flops(config: ModelConfig, sequence_length: int, *, causal: bool) -> float:
    """Count the forward FLOPs of query x key and weights x value for one token of one block.

    A window of w tokens leaves w keys of the sequence's s; of a causal model's, w (1 - w / 2s) on average.
    """
    keys = min(sequence_length, config.attention_window or sequence_length)
    full = 4 * config.num_attention_heads * config.kv_channels * keys
    return full * (1 - keys / (2 * sequence_length)) if causal else full
