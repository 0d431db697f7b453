"""GPT-2: learned positions, LayerNorm, biases; matrices lie transposed, and query, key and value are one already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import TheirConfig
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.family import Entry, embedding_name, refusals
from megatron.convert.hugging_face.transforms import (
    FusedTransposed,
    GroupedHeads,
    PlusOne,
    Same,
    Transform,
    Transposed,
)

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "squared_relu"}
WRITTEN_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "squared_relu": "relu2"}

REQUIRED: dict[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "normalization": "layernorm",
    "activation_function": frozenset(WRITTEN_ACTIVATIONS),
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "qk_layernorm": False,
    "attention_window": 0,
    "attention_softcap": 0.0,
    "scale_embeddings": False,
}


class GPT2:
    """`model_type` gpt2."""

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    prefix: ClassVar[str] = "transformer."
    ignored: ClassVar[tuple[str, ...]] = (r".*\.attn\.(bias|masked_bias)",)

    def read_config(self, config: TheirConfig) -> ModelConfig:
        """Make the model's section of their config.

        Raises:
            ConvertError: the config asks for something that this model does not have.
        """
        config.require(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        hidden, dropout = config.count("n_embd"), float(config.number("resid_pdrop", 0.1))
        positions = config.count("n_positions", 1024)
        return ModelConfig(
            num_layers=config.count("n_layer"),
            hidden_size=hidden,
            num_attention_heads=config.count("n_head"),
            ffn_hidden_size=config.count("n_inner", 4 * hidden),
            max_position_embeddings=positions,
            rotary_original_max_positions=positions,
            rotary_attention_factor=1.0,
            norm_epsilon=float(config.number("layer_norm_epsilon", 1e-5)),
            activation_function=config.choose("activation_function", ACTIVATIONS, "gelu_new"),
            untie_embeddings_and_output_weights=not config.switch("tie_word_embeddings", True),
            attention_dropout=float(config.number("attn_pdrop", 0.1)),
            hidden_dropout=dropout,
            init_method_std=float(config.number("initializer_range", 0.02)),
        )

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Make their config of the model's section, but for vocabulary, special tokens and dtype.

        Raises:
            ConvertError: the model has something that the family does not have.
        """
        heads, hidden = model.num_attention_heads, model.hidden_size
        required = {**REQUIRED, "num_key_value_heads": heads, "kv_channels": hidden // heads}
        if problems := refusals(model, required):
            raise ConvertError(f"{self.model_type}: {'; '.join(problems)}")
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "n_layer": model.num_layers,
            "n_embd": hidden,
            "n_head": heads,
            "n_inner": model.ffn_hidden_size,
            "n_positions": model.max_position_embeddings,
            "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": WRITTEN_ACTIVATIONS[model.activation_function],
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "attn_pdrop": model.attention_dropout,
            "resid_pdrop": model.hidden_dropout,
            "embd_pdrop": model.hidden_dropout,
            "initializer_range": model.init_method_std,
        }

    def entries(self, model: ModelConfig) -> Iterator[Entry]:
        """Give every logical tensor once, in the order of the stages."""
        heads = FusedTransposed(GroupedHeads(model.num_attention_heads, model.num_key_value_heads, model.kv_channels))
        products: tuple[tuple[str, str, Transform], ...] = (
            ("attention.qkv", "attn.c_attn", heads),
            ("attention.output", "attn.c_proj", Transposed()),
            ("mlp.up", "mlp.c_fc", Transposed()),
            ("mlp.down", "mlp.c_proj", Transposed()),
        )
        yield Entry(embedding_name(model), ("transformer.wte.weight",))
        yield Entry("1.table.weight", ("transformer.wpe.weight",))
        for layer in range(model.num_layers):
            ours, theirs = f"{layer + 2}", f"transformer.h.{layer}"
            yield from _norm(model, f"{ours}.attention_norm", f"{theirs}.ln_1")
            yield from _norm(model, f"{ours}.mlp_norm", f"{theirs}.ln_2")
            for name, their_name, transform in products:
                for kind in ("weight", "bias"):
                    yield Entry(f"{ours}.{name}.{kind}", (f"{theirs}.{their_name}.{kind}",), transform)
        last = model.num_layers + 2
        yield from _norm(model, f"{last}", "transformer.ln_f")
        if model.untie_embeddings_and_output_weights:
            yield Entry(f"{last + 1}.weight", ("lm_head.weight",))


def _norm(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", (f"{theirs}.weight",), PlusOne() if model.apply_layernorm_1p else Same())
    yield Entry(f"{ours}.bias", (f"{theirs}.bias",))
