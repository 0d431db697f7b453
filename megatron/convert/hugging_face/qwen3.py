"""Qwen 3: Llama with norms on the query and key heads, whose size is free."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.family import ANY_WINDOW
from megatron.convert.hugging_face.llama_like import LlamaLike, read_activation, uniform_window, write_window


class Qwen3(LlamaLike):
    """`model_type` qwen3."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    own: ClassVar[dict[str, Any]] = {
        "scale_embeddings": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        "attention_window": ANY_WINDOW,
    }

    def read_own(self, config: TheirConfig) -> dict[str, Any]:
        """Give head norms, size of a head, window and activation.

        Raises:
            ConvertError: attention has biases, or some layers have a window and others not.
        """
        config.require(attention_bias=False)
        window = uniform_window(config, config.count("num_hidden_layers"))
        return {
            "qk_layernorm": True,
            "kv_channels": config.count("head_dim", 128),
            "attention_window": window,
            **read_activation(config),
        }

    def write_own(self, model: ModelConfig) -> dict[str, Any]:
        """Give their keys of biases and window."""
        return {"attention_bias": False, **write_window(model)}
