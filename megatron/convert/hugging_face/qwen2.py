"""Qwen 2 and 2.5: Llama with biases in the query/key/value product alone."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.family import ANY_WINDOW
from megatron.convert.hugging_face.llama_like import LlamaLike, read_activation, uniform_window, write_window


class Qwen2(LlamaLike):
    """`model_type` qwen2."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    own: ClassVar[dict[str, Any]] = {
        "scale_embeddings": False,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "attention_window": ANY_WINDOW,
    }

    def read_own(self, config: TheirConfig) -> dict[str, Any]:
        """Give biases, window and activation.

        Raises:
            ConvertError: some layers have a window and others not.
        """
        window = uniform_window(config, config.count("num_hidden_layers"))
        return {"add_qkv_bias": True, "attention_window": window, **read_activation(config)}

    def write_own(self, model: ModelConfig) -> dict[str, Any]:
        """Give their keys of the window."""
        return write_window(model)
