"""Mistral: Llama with a window of attention."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.family import ANY_WINDOW
from megatron.convert.hugging_face.llama_like import LlamaLike, read_activation


class Mistral(LlamaLike):
    """`model_type` mistral."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    max_positions = 131072
    own: ClassVar[dict[str, Any]] = {
        "scale_embeddings": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "attention_window": ANY_WINDOW,
    }

    def read_own(self, config: TheirConfig) -> dict[str, Any]:
        """Give the window, which is theirs by default unless it is null, and the activation.

        Raises:
            ConvertError: layers differ.
        """
        config.refuse(layer_types="windows that differ from layer to layer cannot be converted")
        none = config.values.get("sliding_window", 4096) is None
        return {"attention_window": 0 if none else config.count("sliding_window", 4096), **read_activation(config)}

    def write_own(self, model: ModelConfig) -> dict[str, Any]:
        """Give their key of the window."""
        return {"sliding_window": model.attention_window or None}
