"""Rotary positions in their config: `rope_theta` with `rope_scaling`, or both as `rope_parameters`.

The first form is written: every version of transformers reads it, while older ones overlook the second.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.errors import ConvertError

TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
DEFAULT_BASE = 10000.0


def read_rope(config: TheirConfig, max_positions: int) -> dict[str, Any]:
    """Give the rotary fields of the model's section, complete.

    Raises:
        ConvertError: a kind of scaling, or a variant of one, that this model does not have.
    """
    config.require(partial_rotary_factor=1.0)
    scaling = config.get("rope_parameters", None) or config.get("rope_scaling", None) or {}
    if not isinstance(scaling, dict):
        raise ConvertError(f"{config.source}: rope_scaling (or rope_parameters) is no object")
    rope = TheirConfig(scaling, f"{config.source} (rope)")
    rope.require(partial_rotary_factor=1.0, truncate=True)
    rope.refuse(
        mscale="only yarn's usual factor on the tables, or attention_factor, can be converted",
        mscale_all_dim="only yarn's usual factor on the tables, or attention_factor, can be converted",
        full_attention="positions that differ from layer to layer cannot be converted",
        sliding_attention="positions that differ from layer to layer cannot be converted",
    )
    kind = rope.choose("rope_type" if "rope_type" in scaling else "type", TYPES, "default")
    fields: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": float(rope.number("rope_theta", None) or config.number("rope_theta", DEFAULT_BASE)),
        "rotary_scaling_type": kind,
        "rotary_original_max_positions": max_positions,
        "rotary_attention_factor": 1.0,
    }
    if kind == "none":
        return fields
    factor = float(rope.number("factor"))
    if factor < 1:
        raise ConvertError(f"{rope.source}: factor is {factor:g}, and positions are stretched by at least 1")
    fields["rotary_scaling_factor"] = factor
    if kind == "linear":
        return fields | {"rotary_original_max_positions": max(round(max_positions / factor), 1)}
    fields["rotary_original_max_positions"] = rope.count("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return fields | {
            "rotary_low_freq_factor": float(rope.number("low_freq_factor")),
            "rotary_high_freq_factor": float(rope.number("high_freq_factor")),
        }
    return fields | {
        "rotary_beta_fast": float(rope.number("beta_fast", 32.0)),
        "rotary_beta_slow": float(rope.number("beta_slow", 1.0)),
        "rotary_attention_factor": float(rope.number("attention_factor", 0.1 * math.log(factor) + 1.0)),
    }


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Give their keys of the rotary fields of a model that rotates whole heads."""
    kind, base, size = model.rotary_scaling_type, model.rotary_base, model.kv_channels
    factor, original = model.rotary_scaling_factor, model.rotary_original_max_positions
    if kind == "ntk":  # for them this is another base, and no scaling
        return {"rope_theta": base * factor ** (size / (size - 2)), "rope_scaling": None}
    if kind == "none":
        return {"rope_theta": base, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        scaling |= {
            "low_freq_factor": model.rotary_low_freq_factor,
            "high_freq_factor": model.rotary_high_freq_factor,
            "original_max_position_embeddings": original,
        }
    elif kind == "yarn":
        scaling |= {
            "beta_fast": model.rotary_beta_fast,
            "beta_slow": model.rotary_beta_slow,
            "attention_factor": model.rotary_attention_factor,
            "original_max_position_embeddings": original,
        }
    return {"rope_theta": base, "rope_scaling": scaling}
