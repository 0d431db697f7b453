"""Gemma, the first: word embeddings times sqrt(hidden size), norm weights that are kept minus one, a GeGLU."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.llama_like import LlamaLike
from megatron.convert.hugging_face.transforms import Same, Transform

ACTIVATIONS = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"}
"""The first releases say "gelu" and mean its approximation, as transformers takes it too."""


class Gemma(LlamaLike):
    """`model_type` gemma."""

    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    tied_by_default = True
    max_positions = 8192
    own: ClassVar[dict[str, Any]] = {
        "scale_embeddings": True,
        "apply_layernorm_1p": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "activation_function": "geglu_tanh",
    }

    def read_own(self, config: TheirConfig) -> dict[str, Any]:
        """Give scaling, norms, size of a head and activation.

        Raises:
            ConvertError: attention has biases or looks ahead.
        """
        config.require(attention_bias=False)
        config.refuse(use_bidirectional_attention="attention is causal here")
        key = "hidden_activation" if config.get("hidden_activation", None) else "hidden_act"
        return {
            "scale_embeddings": True,
            "apply_layernorm_1p": True,
            "kv_channels": config.count("head_dim", 256),
            "activation_function": config.choose(key, ACTIVATIONS, "gelu_pytorch_tanh"),
        }

    def write_own(self, model: ModelConfig) -> dict[str, Any]:
        """Give their keys of biases and activation, under both of its names."""
        return {"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"}

    def norm(self, model: ModelConfig) -> Transform:
        """Both keep the weight of a norm minus one."""
        return Same()
