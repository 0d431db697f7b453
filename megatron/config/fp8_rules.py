"""Rules of the products in 8 bits."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.kernels import KernelsConfig
from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.training import TrainingConfig

MULTIPLE = 16
"""Of which matrix units take 8-bit numbers, in both features of a weight."""


def fp8_lies_between_bf16(kernels: KernelsConfig, training: TrainingConfig) -> Iterator[str]:
    """What is brought into 8 bits, and what comes of it, is bf16."""
    if kernels.fp8 and training.precision != "bf16":
        yield (
            f"--fp8 with --precision {training.precision}: such products take and give bf16; use --precision bf16, "
            f"or leave --fp8 out."
        )


def fp8_format_needs_fp8(kernels: KernelsConfig) -> Iterator[str]:
    """A format is one of numbers in 8 bits."""
    if kernels.fp8_format is not None and not kernels.fp8:
        yield f"--fp8-format {kernels.fp8_format} has no effect without --fp8: add that, or drop it."


def fp8_features_are_multiples(kernels: KernelsConfig, model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """A rank's part of each weight of a block has multiples of 16 features on both sides."""
    size = parallel.tensor_model_parallel_size
    heads, key_value_heads = model.num_attention_heads, model.num_key_value_heads
    parts = {
        f"--hidden-size {model.hidden_size}": (model.hidden_size, 1),
        f"--ffn-hidden-size {model.ffn_hidden_size}": (model.ffn_hidden_size, size),
        f"--num-attention-heads {heads} x --kv-channels {model.kv_channels}": (heads * model.kv_channels, size),
        f"(--num-attention-heads {heads} + 2 x --num-key-value-heads {key_value_heads}) x --kv-channels "
        f"{model.kv_channels}": ((heads + 2 * key_value_heads) * model.kv_channels, size),
    }
    for said, (features, ranks) in parts.items():
        if kernels.fp8 and features % ranks == 0 and features // ranks % MULTIPLE:
            over = f" over --tensor-model-parallel-size {size}" if ranks > 1 else ""
            yield (
                f"{said}{over} gives a rank {features // ranks} features, and --fp8 takes multiples of {MULTIPLE}: "
                f"change one of them, or leave --fp8 out."
            )


def fp8_takes_mlps_whole(kernels: KernelsConfig) -> Iterator[str]:
    """Chunks of an MLP add up the gradients of its weights in fp32, which products in 8 bits give in bf16."""
    if kernels.fp8 and kernels.mlp_chunk_size:
        yield (
            f"--fp8 with --mlp-chunk-size {kernels.mlp_chunk_size}: chunks of an MLP are not multiplied in 8 bits; "
            f"leave one or the other out."
        )


def fp8_is_not_compiled(kernels: KernelsConfig) -> Iterator[str]:
    """What a step keeps of its weights in 8 bits is no part of a graph."""
    if kernels.fp8 and kernels.compile:
        yield "--fp8 with --compile: products in 8 bits are not compiled; leave one or the other out."
