"""Llama 2 and 3, and what has their config: biases in all products or in none."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.llama_like import LlamaLike, read_activation


class Llama(LlamaLike):
    """`model_type` llama."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    max_positions = 2048
    own: ClassVar[dict[str, Any]] = {"scale_embeddings": False}

    def read_own(self, config: TheirConfig) -> dict[str, Any]:
        """Give biases and activation.

        Raises:
            ConvertError: attention has biases and the MLP has none, or the other way round.
        """
        in_attention, in_mlp = config.switch("attention_bias", False), config.switch("mlp_bias", False)
        if in_attention != in_mlp:
            raise ConvertError(
                f"{config.source}: attention_bias is {in_attention} and mlp_bias is {in_mlp}: --add-bias-linear gives "
                "biases to both or to none"
            )
        return {"add_bias_linear": in_attention, **read_activation(config)}

    def write_own(self, model: ModelConfig) -> dict[str, Any]:
        """Give their keys of the biases.

        Raises:
            ConvertError: query, key and value have biases and other products none, or the other way round.
        """
        if model.add_qkv_bias != model.add_bias_linear:
            raise ConvertError(
                f"llama: --add-qkv-bias is {model.add_qkv_bias}, not {model.add_bias_linear} as --add-bias-linear"
            )
        return {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
