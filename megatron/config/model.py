"""The model: its shape, positions, norms, activations and initialisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.config.flags import DERIVED, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE, at_least, flag

GATED_ACTIVATIONS = frozenset({"swiglu", "geglu", "geglu_tanh"})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one GPT."""

    title: ClassVar[str] = "model"

    num_layers: int = flag(range=at_least(1), help="number of transformer blocks")
    hidden_size: int = flag(range=at_least(1), help="width of the residual stream")
    num_attention_heads: int = flag(range=at_least(1), help="number of query heads")
    num_key_value_heads: int = flag(
        DERIVED,
        range=at_least(1),
        help="number of key/value heads: fewer than the query heads is GQA, one is MQA",
        derived="num_attention_heads",
    )
    kv_channels: int = flag(
        DERIVED, range=at_least(1), help="size of one attention head", derived="hidden_size / num_attention_heads"
    )
    ffn_hidden_size: int = flag(
        DERIVED,
        range=at_least(1),
        help="width inside the MLP (of each of the two halves when the activation is gated)",
        derived="4 x hidden_size; 8/3 x hidden_size rounded down to a multiple of 64 when gated",
    )
    max_position_embeddings: int = flag(
        DERIVED,
        range=at_least(1),
        help="rows of the learned position table, and the longest legal sequence",
        derived="seq_length",
    )
    make_vocab_size_divisible_by: int = flag(
        128, range=at_least(1), help="the vocabulary is padded to a multiple of this, whatever the layout"
    )

    position_embedding_type: str = flag(
        "learned_absolute",
        choices=("learned_absolute", "rope", "none"),
        help="how tokens know their position",
    )
    scale_embeddings: bool = flag(
        False, help="multiply word embeddings by sqrt(hidden_size), which a tied output head does not see (Gemma)"
    )
    rotary_base: float = flag(10000.0, range=POSITIVE, help="theta of the rotary frequencies")
    rotary_percent: float = flag(1.0, range=SHARE, help="share of each head's channels that is rotated")
    rotary_interleaved: bool = flag(
        False, help="rotate neighbouring channels (GPT-J) instead of the two halves of a head (Llama)"
    )
    rotary_scaling_type: str = flag(
        "none",
        choices=("none", "linear", "ntk", "yarn", "llama3"),
        help="how rotary frequencies are stretched beyond the length they were trained for",
    )
    rotary_scaling_factor: float = flag(
        1.0, range=at_least(1), help="new length over original length, for --rotary-scaling-type"
    )
    rotary_original_max_positions: int = flag(
        DERIVED,
        range=at_least(1),
        help="length the unscaled frequencies were trained for (yarn, llama3)",
        derived="max_position_embeddings / rotary_scaling_factor",
    )
    rotary_low_freq_factor: float = flag(
        1.0, range=POSITIVE, help="llama3 scaling: wavelengths above original/this stretch fully"
    )
    rotary_high_freq_factor: float = flag(
        4.0, range=POSITIVE, help="llama3 scaling: wavelengths below original/this stay"
    )
    rotary_beta_fast: float = flag(
        32.0, range=POSITIVE, help="yarn: channels with more turns than this over the original length stay"
    )
    rotary_beta_slow: float = flag(
        1.0, range=POSITIVE, help="yarn: channels with fewer turns than this are stretched fully"
    )
    rotary_attention_factor: float = flag(
        DERIVED,
        range=POSITIVE,
        help="yarn: factor on the rotary tables",
        derived="0.1 x ln(rotary_scaling_factor) + 1 with yarn, else 1",
    )

    normalization: str = flag("layernorm", choices=("layernorm", "rmsnorm"), help="kind of norm")
    norm_epsilon: float = flag(1e-5, range=POSITIVE, help="added to the variance inside norms")
    apply_layernorm_1p: bool = flag(False, help="store norm weights minus one, so that weight decay pulls them to one")
    qk_layernorm: bool = flag(False, help="normalise each query and key head before the rotation")
    activation_function: str = flag(
        "gelu",
        choices=("gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "squared_relu"),
        help="nonlinearity of the MLP; gelu is exact, the _tanh ones are OpenAI's approximation",
    )
    add_bias_linear: bool = flag(True, help="biases in the linear layers")
    add_qkv_bias: bool = flag(DERIVED, help="bias in the query/key/value product", derived="add_bias_linear")
    untie_embeddings_and_output_weights: bool = flag(
        False, help="give the output head its own weight instead of the embedding's"
    )
    attention_dropout: float = flag(0.1, range=PROBABILITY, help="probability of dropping an attention weight")
    attention_window: int = flag(
        0, range=at_least(0), help="tokens that each token attends to, itself and those just before it; 0: all"
    )
    attention_softcap: float = flag(
        0.0, range=NOT_NEGATIVE, help="bound c of the attention logits, as c x tanh(logits / c); 0: none"
    )
    hidden_dropout: float = flag(
        0.1, range=PROBABILITY, help="probability of dropping a channel after embedding, attention and MLP"
    )
    fp32_residual_connection: bool = flag(False, help="keep the residual stream in fp32")
    init_method_std: float = flag(
        0.02,
        range=POSITIVE,
        help="standard deviation of initial weights (output products: divided by sqrt(2 x num_layers))",
    )

    def __post_init__(self) -> None:
        """Fill in what follows from this section alone."""
        derived = {
            "num_key_value_heads": self.num_attention_heads,
            "kv_channels": self.hidden_size // max(self.num_attention_heads, 1),
            "ffn_hidden_size": self._default_ffn_hidden_size(),
            "add_qkv_bias": self.add_bias_linear,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with a second projection."""
        return self.activation_function in GATED_ACTIVATIONS

    @property
    def drops(self) -> bool:
        """Whether training draws masks of dropout."""
        return self.hidden_dropout > 0 or self.attention_dropout > 0

    def _default_ffn_hidden_size(self) -> int:
        if self.gated:
            return int(8 * self.hidden_size / 3) // 64 * 64 or 64
        return 4 * self.hidden_size
