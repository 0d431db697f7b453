"""What the families after Llama share: RMS norms before attention and a gated MLP, rotary positions, grouped heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.family import Entry, embedding_name, refusals
from megatron.convert.hugging_face.rope import read_rope, write_rope
from megatron.convert.hugging_face.transforms import GroupedHeads, Halves, PlusOne, Same, Stacked, Transform

ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
"""Their activation of the gate, and ours of the whole MLP."""

WRITTEN_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}

REQUIRED = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "normalization": "rmsnorm",
    "activation_function": frozenset(WRITTEN_ACTIVATIONS),
    "attention_softcap": 0.0,
}
"""Fields that none of these families has otherwise."""


class LlamaLike(ABC):
    """A family of that kind. Subclasses say what they have beyond it."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str] = "model."
    ignored: ClassVar[tuple[str, ...]] = (r".*rotary_emb\.inv_freq",)

    tied_by_default: ClassVar[bool] = False
    norm_epsilon: ClassVar[float] = 1e-6
    max_positions: ClassVar[int] = 32768
    """Defaults of theirs, for keys that a config leaves out."""

    own: ClassVar[dict[str, Any]] = {}
    """Fields of ours that have one value, or one of a set of values, in this family, which leaves out its default."""

    @abstractmethod
    def read_own(self, config: TheirConfig) -> dict[str, Any]:
        """Give the fields in which the family differs from the others.

        Raises:
            ConvertError: the config asks for something that this model does not have.
        """

    @abstractmethod
    def write_own(self, model: ModelConfig) -> dict[str, Any]:
        """Give their keys of those fields."""

    def read_config(self, config: TheirConfig) -> ModelConfig:
        """Make the model's section of their config.

        Raises:
            ConvertError: the config asks for something that this model does not have.
        """
        max_positions = config.count("max_position_embeddings", self.max_positions)
        heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
        fields: dict[str, Any] = {
            "num_layers": config.count("num_hidden_layers"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": config.count("num_key_value_heads", heads),
            "kv_channels": config.count("head_dim", hidden // heads),
            "ffn_hidden_size": config.count("intermediate_size"),
            "max_position_embeddings": max_positions,
            "normalization": "rmsnorm",
            "norm_epsilon": float(config.number("rms_norm_eps", self.norm_epsilon)),
            "add_bias_linear": False,
            "untie_embeddings_and_output_weights": not config.switch("tie_word_embeddings", self.tied_by_default),
            "attention_dropout": float(config.number("attention_dropout", 0.0)),
            "hidden_dropout": 0.0,
            "init_method_std": float(config.number("initializer_range", 0.02)),
        }
        return ModelConfig(**(fields | read_rope(config, max_positions) | self.read_own(config)))

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Make their config of the model's section, but for vocabulary, special tokens and dtype.

        Raises:
            ConvertError: the model has something that the family does not have.
        """
        problems = refusals(model, {**REQUIRED, "attention_window": 0, "qk_layernorm": False, **self.own})
        if model.qk_layernorm and model.rotary_interleaved and model.rotary_percent != 1:
            problems.append("--rotary-interleaved turns a part of the head")
        if problems:
            raise ConvertError(f"{self.model_type}: {'; '.join(problems)}")
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_key_value_heads,
            "head_dim": model.kv_channels,
            "intermediate_size": model.ffn_hidden_size,
            "max_position_embeddings": model.max_position_embeddings,
            "rms_norm_eps": model.norm_epsilon,
            "hidden_act": WRITTEN_ACTIVATIONS[model.activation_function],
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "attention_dropout": model.attention_dropout,
            "initializer_range": model.init_method_std,
            **write_rope(model),
            **self.write_own(model),
        }

    def norm(self, model: ModelConfig) -> Transform:
        """How the weight of a norm is kept: theirs is the factor itself."""
        return PlusOne() if model.apply_layernorm_1p else Same()

    def entries(self, model: ModelConfig) -> Iterator[Entry]:
        """Give every logical tensor once, in the order of the stages."""
        norm = self.norm(model)
        yield Entry(embedding_name(model), ("model.embed_tokens.weight",))
        for layer in range(model.num_layers):
            yield from self._block(model, layer, norm)
        last = model.num_layers + 2
        yield Entry(f"{last}.weight", ("model.norm.weight",), norm)
        if model.untie_embeddings_and_output_weights:
            yield Entry(f"{last + 1}.weight", ("lm_head.weight",))

    def _block(self, model: ModelConfig, layer: int, norm: Transform) -> Iterator[Entry]:
        ours, theirs = f"{layer + 2}", f"model.layers.{layer}"
        heads = GroupedHeads(
            model.num_attention_heads, model.num_key_value_heads, model.kv_channels, model.rotary_interleaved
        )
        biased = ("weight", "bias") if model.add_bias_linear else ("weight",)
        yield Entry(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",), norm)
        for kind in ("weight", "bias") if model.add_qkv_bias else ("weight",):
            names = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Entry(f"{ours}.attention.qkv.{kind}", names, heads)
        if model.qk_layernorm:
            yield from self._head_norms(model, f"{ours}.attention", f"{theirs}.self_attn")
        for kind in biased:
            yield Entry(f"{ours}.attention.output.{kind}", (f"{theirs}.self_attn.o_proj.{kind}",))
        yield Entry(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",), norm)
        for kind in biased:
            names = tuple(f"{theirs}.mlp.{part}_proj.{kind}" for part in ("gate", "up"))
            yield Entry(f"{ours}.mlp.up.{kind}", names, Stacked())
        for kind in biased:
            yield Entry(f"{ours}.mlp.down.{kind}", (f"{theirs}.mlp.down_proj.{kind}",))

    def _head_norms(self, model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
        """Give the norms of query and key heads, whose channels are those of a head."""
        transform: Transform = Halves() if model.rotary_interleaved else Same()
        yield Entry(f"{ours}.query_norm.weight", (f"{theirs}.q_norm.weight",), transform)
        yield Entry(f"{ours}.key_norm.weight", (f"{theirs}.k_norm.weight",), transform)


def uniform_window(config: TheirConfig, num_layers: int) -> int:
    """Read the window of Qwen's configs, which may begin at a later layer; 0: none.

    Raises:
        ConvertError: some layers have a window and others not.
    """
    window = config.count("sliding_window", 4096) if config.switch("use_sliding_window", False) else 0
    first = config.number("max_window_layers", 28)
    kinds = config.get("layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(num_layers)]
    if kinds == ["full_attention"] * num_layers:
        return 0
    if kinds == ["sliding_attention"] * num_layers and window:
        return int(window)
    raise ConvertError(
        f"{config.source}: layer_types (or max_window_layers {first} of {num_layers} layers) give a sliding window to "
        f"some layers alone: --attention-window is of all layers"
    )


def write_window(model: ModelConfig) -> dict[str, Any]:
    """Give Qwen's keys of a window that all layers have, or none."""
    window = model.attention_window
    return {"use_sliding_window": bool(window), "sliding_window": window or None, "max_window_layers": 0}


def read_activation(config: TheirConfig) -> dict[str, Any]:
    """Give the field of the MLP's nonlinearity."""
    return {"activation_function": config.choose("hidden_act", ACTIVATIONS, "silu")}
