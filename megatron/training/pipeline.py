"""What a pipeline's stages hold when nobody says, and what is told of them at the start."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.config.model import ModelConfig
from megatron.model.flops import model_flops_per_token
from megatron.parallel.partition import balance_blocks


def balance_stages(model: ModelConfig, *, padded_vocab_size: int, seq_length: int, num_stages: int) -> tuple[int, ...]:
    """Choose the blocks of each stage so that all work equally long, counted in floating-point operations.

    The output head on the last stage is worth some blocks, the lookup of embeddings none.
    """
    blocks = model_flops_per_token(model, 0, seq_length)
    head = model_flops_per_token(model, padded_vocab_size, seq_length) - blocks
    return balance_blocks(model.num_layers, num_stages, last=head / (blocks / model.num_layers))


def describe_pipeline(counts: Sequence[int], num_micro_batches: int) -> str:
    """Name the stages and the share of a step in which each waits: (p - 1) / (m + p - 1) of 1F1B."""
    waiting = (len(counts) - 1) / (num_micro_batches + len(counts) - 1)
    advice = "; a larger --global-batch-size lowers that" if num_micro_batches < 4 * len(counts) else ""
    return (
        f" pipeline: stages of {', '.join(map(str, counts))} blocks; with {num_micro_batches} micro-batches a step "
        f"each stage waits {100 * waiting:.0f} % of the time{advice}"
    )
