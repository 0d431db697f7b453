"""What the older systems called a parameter, and what it is called here.

| what | Megatron-LM before core, Megatron-DeepSpeed | Megatron core |
|---|---|---|
| norm before attention | `input_layernorm`, `input_norm` | `input_layernorm`, or part of `linear_qkv` |
| query, key and value | `self_attention.query_key_value` | `self_attention.linear_qkv` |
| output of attention | `self_attention.dense` | `self_attention.linear_proj` |
| norm before the MLP | `post_attention_layernorm` or `_norm` | `pre_mlp_layernorm`, or part of `linear_fc1` |
| MLP | `mlp.dense_h_to_4h`, `mlp.dense_4h_to_h` | `mlp.linear_fc1`, `mlp.linear_fc2` |

The oldest say `attention` for `self_attention`.

A place is what a parameter is, whatever its name: `words`, `positions`, `block.3.mlp.up.weight`, `norm.weight`, `head`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from megatron.model.gpt import TIED_EMBEDDING

STEMS = {
    "input_layernorm": "attention_norm",
    "input_norm": "attention_norm",
    "self_attention.query_key_value": "attention.qkv",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.dense": "attention.output",
    "self_attention.linear_proj": "attention.output",
    "self_attention.q_layernorm": "attention.query_norm",
    "self_attention.k_layernorm": "attention.key_norm",
    "self_attention.q_norm": "attention.query_norm",
    "self_attention.k_norm": "attention.key_norm",
    "post_attention_layernorm": "mlp_norm",
    "post_attention_norm": "mlp_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.linear_fc1": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
    "mlp.linear_fc2": "mlp.down",
}
"""The modules of a block."""

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "attention_norm.",
    "mlp.linear_fc1.layer_norm_": "mlp_norm.",
}
"""Norms that Transformer Engine keeps inside of the product that follows them."""

OUTSIDE = {
    "embedding.word_embeddings.weight": "words",
    "embedding.position_embeddings.weight": "positions",
    "embedding.position_embeddings.local_embeddings.weight": "position shards",
    "word_embeddings_for_head.weight": "words again",
    "word_embeddings.weight": "words again",
    "output_layer.weight": "head",
}
"""Parameters that are in no block."""

WORDS_AGAIN = "words again"
"""The copy of a tied embedding that the last stage of a pipeline keeps."""

POSITION_SHARDS = "position shards"
"""A position table of which each tensor rank keeps another part."""

BUFFERS = re.compile(r"_extra_state$|inv_freq$|(^|\.)(attention_bias|masked_bias)$")
"""Entries that are no parameters: they follow from the configuration."""

_BLOCK = re.compile(r"(?:encoder|transformer|decoder)\.layers\.(\d+)\.(.+)")
_FINAL_NORM = re.compile(r"(?:encoder|transformer|decoder)\.final_(?:layernorm|norm)\.(weight|bias)")
_WRAPPERS = re.compile(r"^(?:module\.)*(?:language_model\.)?")


def flatten(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of nested dictionaries under their dotted names, in order, without buffers."""
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if BUFFERS.search(name):
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, Tensor):
            yield name, value


def place_of(name: str, first_block: int = 0) -> str | None:
    """Find what a parameter of a whole model, or of one stage of it, is; None when nobody knows it.

    Args:
        name: dotted, as `flatten` gives it.
        first_block: index in the whole model of the stage's block 0.
    """
    name = _WRAPPERS.sub("", name)
    if name in OUTSIDE:
        return OUTSIDE[name]
    if norm := _FINAL_NORM.fullmatch(name):
        return f"norm.{norm[1]}"
    block = _BLOCK.fullmatch(name)
    inside = block and inside_block(block[2])
    return f"block.{first_block + int(block[1])}.{inside}" if block and inside else None


def inside_block(name: str) -> str | None:
    """Find what a parameter of a block is, by its name inside of it; None when nobody knows it."""
    for old, new in FUSED_NORMS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    stem, _, kind = name.rpartition(".")
    stem = re.sub(r"^attention\.", "self_attention.", stem)
    return f"{STEMS[stem]}.{kind}" if stem in STEMS and kind in {"weight", "bias"} else None


def name_of(place: str, num_layers: int, *, tied: bool) -> str | None:
    """Return the name of a place's parameter in `GPT`; None for the copy of a tied embedding."""
    if place == "words":
        return f"{TIED_EMBEDDING}.weight" if tied else "0.weight"
    if place in {"positions", POSITION_SHARDS}:
        return "1.table.weight"
    if place == "head":
        return None if tied else f"{num_layers + 3}.weight"
    if place == WORDS_AGAIN:
        return None
    kind, _, rest = place.partition(".")
    if kind == "norm":
        return f"{num_layers + 2}.{rest}"
    layer, _, inside = rest.partition(".")
    return f"{int(layer) + 2}.{inside}"
