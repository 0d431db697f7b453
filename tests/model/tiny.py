"""Small models, and weights large enough that a wrong one shows."""

from typing import Any

import torch

from megatron.config.model import ModelConfig
from megatron.kernels.attention.interface import AttentionBackend
from megatron.kernels.choice import PLAIN, Kernels
from megatron.kernels.registry import find_implementations
from megatron.model.gpt import GPT
from megatron.model.init import initialize_parameters
from megatron.parallel.groups import ParallelGroups
from megatron.parallel.recompute import NONE, RecomputePolicy

SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "make_vocab_size_divisible_by": 16,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.2,
}

LLAMA: dict[str, Any] = {
    "num_key_value_heads": 2,
    "position_embedding_type": "rope",
    "normalization": "rmsnorm",
    "activation_function": "swiglu",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}

VOCAB_SIZE = 100


def backend_called(name: str) -> AttentionBackend:
    return find_implementations("megatron.kernels.attention", AttentionBackend)[name]


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, **changes})


def tiny_gpt(
    *,
    backend: str = "sdpa",
    vocab_size: int = VOCAB_SIZE,
    seed: int = 1,
    groups: ParallelGroups | None = None,
    recompute_policy: RecomputePolicy = NONE,
    loss_chunk_size: int = 0,
    kernels: Kernels = PLAIN,
    mlp_chunk_size: int = 0,
    **changes: Any,
) -> GPT:
    config = tiny_config(**changes)
    model = GPT(
        config,
        vocab_size=vocab_size,
        groups=groups or ParallelGroups.alone(),
        attention=backend_called(backend),
        recompute_policy=recompute_policy,
        loss_chunk_size=loss_chunk_size,
        kernels=kernels,
        mlp_chunk_size=mlp_chunk_size,
    )
    initialize_parameters(model, seed, config.init_method_std, config.num_layers)
    return model


def random_tokens(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed), device="cpu")
