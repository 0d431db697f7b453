"""Rules of the model's shape and positions."""

# ruff: noqa: D401 - the docstring of a rule states what holds, not what the function does

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.config.data import DataConfig
from megatron.config.flags import spell
from megatron.config.model import ModelConfig

SCALING_ONLY = {
    "llama3": ("rotary_low_freq_factor", "rotary_high_freq_factor"),
    "yarn": ("rotary_beta_fast", "rotary_beta_slow"),
}
"""Fields that one kind of scaling reads."""

ROTARY_ONLY = ("rotary_base", "rotary_percent", "rotary_interleaved", "rotary_scaling_type")


def _default(name: str) -> Any:
    return ModelConfig.__dataclass_fields__[name].default


def heads_divide_hidden_size(model: ModelConfig) -> Iterator[str]:
    """Without a head size of its own, the heads share the width evenly."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if hidden % heads and model.kv_channels == hidden // heads:
        yield (
            f"--hidden-size {hidden} is not a multiple of --num-attention-heads {heads}: change one of them, or give "
            f"--kv-channels to choose the size of a head freely."
        )


def key_value_heads_divide_heads(model: ModelConfig) -> Iterator[str]:
    """Each key/value head serves the same number of query heads."""
    if model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"--num-attention-heads {model.num_attention_heads} is not a multiple of --num-key-value-heads "
            f"{model.num_key_value_heads}: each key/value head serves the same number of query heads."
        )


def rotated_channels_are_even(model: ModelConfig) -> Iterator[str]:
    """Rotation turns pairs of channels."""
    rotated = int(model.kv_channels * model.rotary_percent)
    if model.position_embedding_type == "rope" and (rotated % 2 or rotated == 0):
        yield (
            f"--kv-channels {model.kv_channels} x --rotary-percent {model.rotary_percent:g} rotates {rotated} channels "
            f"of a head: rotary positions need an even number above 0."
        )


def positions_cover_the_sequence(model: ModelConfig, data: DataConfig) -> Iterator[str]:
    """No sample is longer than the longest legal sequence."""
    if model.max_position_embeddings < data.seq_length:
        yield (
            f"--max-position-embeddings {model.max_position_embeddings} is less than --seq-length {data.seq_length}: "
            f"raise it, or leave it out to take the sequence length."
        )


def rotary_flags_need_rotary_positions(model: ModelConfig) -> Iterator[str]:
    """A rotary flag has no effect on other kinds of positions."""
    if model.position_embedding_type == "rope":
        return
    for name in ROTARY_ONLY:
        value = getattr(model, name)
        if value != _default(name):
            yield (
                f"{spell(name)} {value} has no effect with --position-embedding-type {model.position_embedding_type}: "
                f"add --position-embedding-type rope, or drop it."
            )


def rotary_bands_belong_to_their_scaling(model: ModelConfig) -> Iterator[str]:
    """The bands of one kind of scaling mean nothing to another."""
    for kind, names in SCALING_ONLY.items():
        for name in names:
            value = getattr(model, name)
            if model.rotary_scaling_type != kind and value != _default(name):
                yield (
                    f"{spell(name)} {value:g} has no effect with --rotary-scaling-type {model.rotary_scaling_type}: it "
                    f"belongs to {kind}."
                )


def rotary_scaling_has_type_and_factor(model: ModelConfig) -> Iterator[str]:
    """A stretch needs both its kind and its amount."""
    kind, factor = model.rotary_scaling_type, model.rotary_scaling_factor
    if kind == "none" and factor != 1:
        yield f"--rotary-scaling-factor {factor:g} needs a --rotary-scaling-type: linear, ntk, yarn or llama3."
    if kind != "none" and factor == 1:
        yield f"--rotary-scaling-type {kind} with --rotary-scaling-factor 1 stretches nothing: give the factor."


def rotary_bands_are_ordered(model: ModelConfig) -> Iterator[str]:
    """The band of frequencies between those that stay and those that stretch is not empty."""
    if model.rotary_scaling_type == "llama3" and model.rotary_low_freq_factor >= model.rotary_high_freq_factor:
        yield (
            f"--rotary-low-freq-factor {model.rotary_low_freq_factor:g} must be less than --rotary-high-freq-factor "
            f"{model.rotary_high_freq_factor:g}."
        )
    if model.rotary_scaling_type == "yarn" and model.rotary_beta_slow >= model.rotary_beta_fast:
        yield (
            f"--rotary-beta-slow {model.rotary_beta_slow:g} must be less than --rotary-beta-fast "
            f"{model.rotary_beta_fast:g}."
        )
