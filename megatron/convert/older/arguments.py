"""The older systems' arguments, as the fields of a model here; what has no counterpart is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.model import ModelConfig

Arguments = Mapping[str, Any]

SAME = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "ffn_hidden_size",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "rotary_percent",
    "rotary_interleaved",
    "apply_layernorm_1p",
    "qk_layernorm",
    "add_bias_linear",
    "untie_embeddings_and_output_weights",
    "attention_dropout",
    "hidden_dropout",
    "fp32_residual_connection",
    "init_method_std",
)
"""Arguments that are fields here by the same name and meaning."""

NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "padded_vocab_size")

LLAMA3_LENGTH = 8192
"""Length from which Megatron core's --use-rope-scaling stretches, whatever the model."""


def _is_mixture(value: Any) -> bool:
    return any(experts not in (None, 0, 1) for experts in (value if isinstance(value, list | tuple) else [value]))


_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_experts": (_is_mixture, "mixtures of experts are not offered"),
    "mlp_type": (lambda value: value not in (None, "standard"), "mixtures of experts are not offered"),
    "multi_latent_attention": (bool, "multi-head latent attention is not offered"),
    "apply_residual_connection_post_layernorm": (bool, "the residual starts before the norm here, not after it"),
    "qk_l2_norm": (bool, "normalising queries and keys to length one is not offered"),
    "quick_geglu": (bool, "this approximation of GELU is not offered"),
    "mtp_num_layers": (bool, "the prediction of several tokens is not offered"),
    "use_mup": (bool, "its multipliers are not offered"),
    "embed_layernorm": (bool, "there is no norm after the embedding here"),
    "no_rope_freq": (bool, "every layer rotates here"),
    "window_attn_skip_freq": (bool, "the window is the same in every layer here"),
    "attention_output_gate": (bool, "a gate on attention is not offered"),
    "retro_add_retriever": (bool, "retrieval is not offered"),
    "is_hybrid_model": (bool, "layers other than attention are not offered"),
    "hybrid_layer_pattern": (bool, "layers other than attention are not offered"),
    "heterogeneous_layers_config_path": (bool, "the blocks are all alike here"),
    "num_tokentypes": (bool, "token types are not offered"),
    "softmax_type": (lambda value: value not in (None, "vanilla"), "attention sinks are not offered"),
    "bert_load": (bool, "this is no GPT"),
}
"""Arguments that, with such a value, make a model that is not offered, and why."""


def model_config(arguments: Arguments, file: Path) -> ModelConfig:
    """Read the model's section from the arguments of an older system.

    Args:
        arguments: by name.
        file: where they are from, for messages.

    Raises:
        ConfigError: arguments are missing, or of a model that is not offered; it carries a sentence for each.
    """
    errors = [
        f"{file}: its arguments lack {name}, without which the model is not known"
        for name in NEEDED
        if arguments.get(name) is None
    ]
    errors += [
        f"{file}: its arguments have {name} = {arguments[name]!r}, and {reason}: it cannot be imported"
        for name, (is_refused, reason) in _REFUSED.items()
        if name in arguments and is_refused(arguments[name])
    ]
    fields = {name: arguments[name] for name in SAME if arguments.get(name) is not None}
    for part in (_attention, _positions, _norm, _activation):
        try:
            fields |= part(arguments)
        except ValueError as error:
            errors.append(f"{file}: its arguments have {error}: it cannot be imported")
    if errors:
        raise ConfigError(errors)
    return _complete(ModelConfig(**fields))


def _complete(config: ModelConfig) -> ModelConfig:
    """Fill in what a run derives of the model from other sections."""
    length = config.rotary_original_max_positions
    length = length or max(round(config.max_position_embeddings / config.rotary_scaling_factor), 1)
    return replace(config, rotary_original_max_positions=length, rotary_attention_factor=1.0)


def _attention(arguments: Arguments) -> dict[str, Any]:
    heads = arguments.get("num_attention_heads")
    if "group_query_attention" in arguments:
        groups = arguments.get("num_query_groups") if arguments["group_query_attention"] else heads
    else:
        groups = arguments.get("num_key_value_heads")
    fields = {"num_key_value_heads": groups or heads}
    biased = arguments.get("add_bias_linear", True)
    fields["add_qkv_bias"] = bool(biased or arguments.get("add_qkv_bias"))
    window = arguments.get("window_size")
    if window is not None:
        left = window[0] if isinstance(window, list | tuple) else window
        if type(left) is not int:
            raise ValueError(f"window_size = {window!r}, which is no number of tokens")
        fields["attention_window"] = 0 if left < 0 else left + 1  # the older flag does not count the token itself
    return fields


def _positions(arguments: Arguments) -> dict[str, Any]:
    kind = arguments.get("position_embedding_type")
    if arguments.get("use_rotary_position_embeddings"):
        kind = "rope"
    elif kind in (None, "learned_absolute"):
        kind = "learned_absolute" if arguments.get("add_position_embedding", True) else "none"
    if kind not in {"learned_absolute", "rope", "none"}:
        raise ValueError(f"position_embedding_type = {kind!r}, and positions are learned_absolute, rope or none here")
    fields: dict[str, Any] = {"position_embedding_type": kind}
    if kind != "rope":
        return fields
    if arguments.get("rope_type") not in (None, "rope"):
        raise ValueError(f"rope_type = {arguments['rope_type']!r}, and only plain rotation can be carried over")
    fields["rotary_base"] = float(
        arguments.get("rotary_base") or arguments.get("rotary_position_embeddings_theta") or 10000
    )
    if arguments.get("use_rope_scaling"):
        factor = float(arguments.get("rope_scaling_factor") or 8.0)
        fields |= {"rotary_scaling_type": "llama3", "rotary_scaling_factor": factor}
        fields["rotary_original_max_positions"] = LLAMA3_LENGTH
    elif arguments.get("rotary_seq_len_interpolation_factor"):
        factor = float(arguments["rotary_seq_len_interpolation_factor"])
        fields |= {"rotary_scaling_type": "linear", "rotary_scaling_factor": factor}
    return fields


def _norm(arguments: Arguments) -> dict[str, Any]:
    kind = str(arguments.get("normalization") or "layernorm").lower()
    if kind not in {"layernorm", "rmsnorm"}:
        raise ValueError(f"normalization = {arguments['normalization']!r}, and norms are layernorm or rmsnorm here")
    epsilon = arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon") or 1e-5
    return {"normalization": kind, "norm_epsilon": float(epsilon)}


def _activation(arguments: Arguments) -> dict[str, Any]:
    """Find the nonlinearity; the older systems fuse plain GELU with its bias as the tanh approximation, by default."""
    if arguments.get("swiglu"):
        return {"activation_function": "swiglu"}
    if arguments.get("squared_relu"):
        return {"activation_function": "squared_relu"}
    biased = arguments.get("add_bias_linear", True)
    fused = biased and arguments.get("bias_gelu_fusion", True) and not arguments.get("onnx_safe")
    approximate = bool(arguments.get("openai_gelu") or fused)
    return {"activation_function": "gelu_tanh" if approximate else "gelu"}


def vocabulary_size(arguments: Arguments, file: Path, given: int | None) -> int:
    """Find how many token ids are in use; the older systems recorded the padded number, some the other one too.

    Raises:
        ConfigError: it is not recorded and not given, or larger than the padded one.
    """
    padded = int(arguments["padded_vocab_size"])
    recorded = arguments.get("vocab_size")
    size = given or (recorded if type(recorded) is int else None)
    if size is None:
        raise ConfigError(
            [
                f"{file}: its arguments have the padded_vocab_size {padded} alone, and the padding must be known: give "
                "--vocab-size with the number of ids that the tokenizer has (50257 for GPT-2's)"
            ]
        )
    if not 0 < size <= padded:
        raise ConfigError(
            [f"--vocab-size {size}: the vocabulary in {file} has {padded} rows with its padding; give 1 to {padded}"]
        )
    return size


def notes_on(arguments: Arguments, is_staged: bool) -> list[str]:
    """Say what the older system computed otherwise, as far as its arguments tell.

    Args:
        arguments: by name.
        is_staged: whether the checkpoint is of the model that was made for pipelines.
    """
    notes = []
    under_deepspeed = bool(arguments.get("deepspeed"))
    tensor_size = arguments.get("tensor_model_parallel_size") or 1
    if under_deepspeed and arguments.get("sequence_parallel") and tensor_size > 1:
        text = "was trained with sequence parallelism under DeepSpeed, where the older system left the gradients of "
        text += "norms and biases unsummed"
        if not is_staged:
            text += ", and summed the embeddings of different tokens"
        notes.append(f"It {text}: the weights are imported as they are; compare the loss before you go on.")
    if arguments.get("embedding_weights_in_fp32"):
        notes.append("Its embedding was computed in fp32; here it has the precision of the model.")
    return notes


def rotates_by_cosines(arguments: Arguments, is_staged: bool) -> bool:
    """Whether the model was trained by a version that took cosine and sine of cosines instead of angles.

    Megatron-DeepSpeed did, outside of its pipeline (which failed instead), since it has the argument asked for here.
    """
    return bool(
        not is_staged
        and arguments.get("deepspeed")
        and arguments.get("use_rotary_position_embeddings")
        and "ds_sequence_parallel_fpdt" in arguments
    )
