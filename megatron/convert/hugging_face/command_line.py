"""The flags that start a run from an imported model."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from megatron.config.data import DataConfig
from megatron.config.flags import spell
from megatron.config.model import ModelConfig

TOKENIZER_FIELDS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")


def model_words(model: ModelConfig) -> list[str]:
    """Write the flags of a model's section that are not the default."""
    idle = _idle(model)
    words = []
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if value != field.default and field.name not in idle:
            words += _words(field.name, value)
    return words


def tokenizer_words(data: DataConfig) -> list[str]:
    """Write the flags of the tokenizer and of the size of the vocabulary."""
    fields = {name: getattr(data, name) for name in TOKENIZER_FIELDS}
    return [word for name, value in fields.items() if value is not None for word in _words(name, value)]


def shell_line(words: list[str]) -> str:
    """Write words so that a shell gives them back, a flag a line."""
    lines: list[str] = []
    for word in map(shlex.quote, words):
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n    ".join(lines)


def _idle(model: ModelConfig) -> set[str]:
    """Name the fields that follow from others as they would without their flag."""
    idle = {"add_qkv_bias"} if model.add_qkv_bias == model.add_bias_linear else set()
    if model.kv_channels * model.num_attention_heads == model.hidden_size:
        idle.add("kv_channels")
    if model.num_key_value_heads == model.num_attention_heads:
        idle.add("num_key_value_heads")
    if model.rotary_scaling_type in ("none", "linear", "ntk"):
        idle.add("rotary_original_max_positions")
    if model.rotary_scaling_type != "yarn":
        idle.add("rotary_attention_factor")
    return idle


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [spell(name)] if value else [spell(f"no_{name}")]
    return [spell(name), repr(value) if isinstance(value, float) else str(value)]
