"""Writes checkpoints as the older systems do, from a model of this program: what their documentation and files show."""

from __future__ import annotations

import argparse
import enum
import math
import random
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.kernels.attention.unfused import BACKEND
from megatron.model.gpt import GPT
from megatron.model.init import initialize_parameters
from megatron.parallel.groups import ParallelGroups
from megatron.parallel.sharding import Sharding, describe_sharding, slice_of

VOCABULARY = 50
KINDS = ("weight", "exp_avg", "exp_avg_sq")

SIZES = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 12}

CLASSIC = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attention.query_key_value",
    "attention.output": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
LATER = {**CLASSIC, "attention_norm": "input_norm", "mlp_norm": "post_attention_norm"}
OLDEST = {**CLASSIC, "attention.qkv": "attention.query_key_value", "attention.output": "attention.dense"}
CORE = {
    "attention_norm": "input_layernorm",
    "attention.output": "self_attention.linear_proj",
    "attention.qkv": "self_attention.linear_qkv",
    "attention.query_norm": "self_attention.q_layernorm",
    "attention.key_norm": "self_attention.k_layernorm",
    "mlp_norm": "pre_mlp_layernorm",
    "mlp.up": "mlp.linear_fc1",
    "mlp.down": "mlp.linear_fc2",
}


@dataclass
class Original:
    """A model with an optimizer's state, as logical tensors by the names of `GPT`."""

    config: ModelConfig
    tensors: dict[str, dict[str, Tensor]]
    shardings: dict[str, Sharding]
    logits: Tensor

    @property
    def tied(self) -> bool:
        return not self.config.untie_embeddings_and_output_weights


def make_original(config: ModelConfig, seed: int = 1) -> Original:
    """Make a model whose weights all differ, biases and norms too."""
    model = GPT(config, vocab_size=VOCABULARY, groups=ParallelGroups.alone(), attention=BACKEND)
    initialize_parameters(model, seed, 0.2, config.num_layers)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    shardings = describe_sharding(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.01)
            moments = {kind: torch.rand(param.shape, generator=generator) for kind in KINDS[1:]}
            for kind, tensor in {"weight": param, **moments}.items():
                if shardings[name].padding:
                    tensor[VOCABULARY:] = 0
                tensors[kind][name] = tensor.detach().clone()
    return Original(config, tensors, shardings, logits_of(model))


def logits_of(model: GPT) -> Tensor:
    model.eval()
    tokens = torch.arange(20).view(2, 10) * 7 % VOCABULARY
    with torch.no_grad():
        return model(tokens)[..., :VOCABULARY]


@dataclass
class Layout:
    """How the older system was started, and what it is."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual: int = 1
    version: float = 3.0
    names: dict[str, str] = field(default_factory=lambda: CLASSIC)
    dtype: torch.dtype = torch.bfloat16
    optimizer: bool = True


def shard_of(original: Original, kind: str, name: str, layout: Layout, rank: int) -> Tensor:
    """Cut out what a tensor rank of the older system holds, in its order of rows."""
    tensor = original.tensors[kind][name]
    sharding = original.shardings[name]
    if sharding.padding:
        divisor = original.config.make_vocab_size_divisible_by * layout.tensor
        rows = math.ceil(VOCABULARY / divisor) * divisor
        whole = torch.full((rows, tensor.shape[1]), 7.0)  # padding that was trained on nothing, but is not zero
        whole[:VOCABULARY] = tensor[:VOCABULARY]
        return whole.chunk(layout.tensor)[rank]
    if name == "1.table.weight" or sharding.dim is None:
        return tensor
    shard = slice_of(tensor, replace(sharding, num_shards=layout.tensor), rank)
    if ".qkv." in name and layout.version < 2.0:
        query, key, value = shard.unflatten(0, (-1, 3, original.config.kv_channels)).unbind(1)
        stacked = torch.stack([query, key, value], dim=0 if layout.version == 0 else 2)
        return stacked.reshape(shard.shape).contiguous()
    return shard.contiguous()


def stage_names(original: Original, first: int, last: int) -> list[str]:
    """Names, in the order of definition, of blocks first to last - 1 and of what lies before or after all of them."""
    layers = original.config.num_layers
    stages = [name for name in original.tensors["weight"] if not name.startswith("tied")]
    held = [name for name in stages if first + 2 <= int(name.split(".")[0]) < last + 2]
    if first == 0:
        outside = ["tied_modules.word_embeddings.weight" if original.tied else "0.weight", "1.table.weight"]
        held = [name for name in outside if name in original.tensors["weight"]] + held
    if last == layers:
        held += [name for name in stages if int(name.split(".")[0]) >= layers + 2]
    return held


def old_name(name: str, layout: Layout, layers: int, first_block: int) -> tuple[str, ...]:
    """Path of nested keys of a parameter in the older system's `state_dict`."""
    core = layout.names is CORE or "attention_norm" not in layout.names
    if name in {"tied_modules.word_embeddings.weight", "0.weight"}:
        return ("embedding.word_embeddings.weight",) if core else ("embedding", "word_embeddings", "weight")
    if name == "1.table.weight":
        return ("embedding.position_embeddings.weight",) if core else ("embedding", "position_embeddings", "weight")
    stage, _, inner = name.partition(".")
    if int(stage) == layers + 2:
        final = "final_norm" if layout.names is LATER else "final_layernorm"
        return (f"decoder.final_layernorm.{inner}",) if core else (encoder(layout), f"{final}.{inner}")
    if int(stage) == layers + 3:
        return ("output_layer.weight",) if core else ("output_layer", "weight")
    stem, _, kind = inner.rpartition(".")
    if stem in layout.names:
        inner = f"{layout.names[stem]}.{kind}"
    else:  # Transformer Engine: the norm is in the product after it
        owner = {"attention_norm": "self_attention.linear_qkv", "mlp_norm": "mlp.linear_fc1"}[stem]
        inner = f"{owner}.layer_norm_{kind}"
    block = f"layers.{int(stage) - 2 - first_block}.{inner}"
    return (f"decoder.{block}",) if core else (encoder(layout), block)


def encoder(layout: Layout) -> str:
    return "transformer" if layout.names is OLDEST else "encoder"


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def older_arguments(original: Original, layout: Layout, **changes: Any) -> argparse.Namespace:
    """Make the flags that the older system would have had for this model."""
    config = original.config
    divisor = config.make_vocab_size_divisible_by * layout.tensor
    values = {name: getattr(config, name) for name in SIZES} | {
        "kv_channels": config.kv_channels,
        "ffn_hidden_size": config.ffn_hidden_size,
        "make_vocab_size_divisible_by": config.make_vocab_size_divisible_by,
        "padded_vocab_size": math.ceil(VOCABULARY / divisor) * divisor,
        "vocab_size": VOCABULARY,
        "add_bias_linear": config.add_bias_linear,
        "add_position_embedding": config.position_embedding_type == "learned_absolute",
        "bias_gelu_fusion": config.activation_function == "gelu_tanh",
        "swiglu": config.activation_function == "swiglu",
        "untie_embeddings_and_output_weights": not original.tied,
        "layernorm_epsilon": config.norm_epsilon,
        "normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[config.normalization],
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "position_embedding_type": config.position_embedding_type,
        "rotary_base": int(config.rotary_base),
        "rotary_percent": config.rotary_percent,
        "qk_layernorm": config.qk_layernorm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "bf16": layout.dtype == torch.bfloat16,
        "params_dtype": layout.dtype,
        "seq_length": 12,
        "lr": 3e-4,
        "consumed_train_samples": 800,
        "tokenizer_type": "GPT2BPETokenizer",
        "data_path": [Path("/data/text")],
        "num_experts": [1],
        "model_type": pickled_enum("megatron.core.enums", "ModelType"),
    }
    return argparse.Namespace(**(values | changes))


def pickled_enum(module: str, name: str) -> enum.Enum:
    """Make a member of an enumeration that pickles as one of the older system's."""
    made = enum.Enum(name, {"only": 1}, module=module, qualname=name)
    holder = sys.modules.setdefault(module, types.ModuleType(module))
    setattr(holder, name, made)
    return made["only"]


def random_states() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }


def write_megatron_lm(original: Original, root: Path, layout: Layout, **changes: Any) -> Path:
    """Write `iter_0000100/mp_rank_*/model_optim_rng.pt` and the file that points to it."""
    folder = root / "iter_0000100"
    chunk_size = original.config.num_layers // (layout.pipeline * layout.virtual)
    for tensor in range(layout.tensor):
        for stage in range(layout.pipeline):
            state = {
                "args": older_arguments(original, layout, **changes),
                "checkpoint_version": layout.version,
                "iteration": 100,
                "rng_state": [random_states()],
            }
            named: list[tuple[str, str]] = []
            for chunk in range(layout.virtual):
                first = (chunk * layout.pipeline + stage) * chunk_size
                key = f"model{chunk}" if layout.virtual > 1 else "model"
                state[key] = stage_state(original, layout, tensor, first, first + chunk_size, named)
            if layout.optimizer:
                state["optimizer"] = _megatron_optimizer(original, layout, tensor, named)
            name = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if layout.pipeline > 1 else "")
            (folder / name).mkdir(parents=True)
            torch.save(state, folder / name / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("100")
    return root


def stage_state(
    original: Original, layout: Layout, tensor: int, first: int, last: int, named: list[tuple[str, str]]
) -> dict[str, Any]:
    layers = original.config.num_layers
    core = layout.names is CORE or "attention_norm" not in layout.names
    tree: dict[str, Any] = {}
    for name in stage_names(original, first, last):
        weight = shard_of(original, "weight", name, layout, tensor).to(layout.dtype)
        path = old_name(name, layout, layers, first)
        put(tree, path if core else ("language_model", *path), weight)
        named.append((name, path[-1]))
    if last == layers and layout.pipeline > 1 and original.tied:
        name = "tied_modules.word_embeddings.weight"
        weight = shard_of(original, "weight", name, layout, tensor).to(layout.dtype)
        put(tree, ("output_layer.weight",) if core else ("word_embeddings_for_head", "weight"), weight)
        named.append((name, "word_embeddings.weight"))
    if core:
        tree["decoder.layers.0.self_attention.core_attention._extra_state"] = None
    return tree


def decay_groups(named: list[tuple[str, str]], original: Original) -> list[list[str]]:
    """Divide parameters as the older systems' optimizers do."""
    bare = [name for name, _ in named if original.tensors["weight"][name].dim() == 1]
    return [[name for name, _ in named if name not in bare], bare]


def _megatron_optimizer(
    original: Original, layout: Layout, tensor: int, named: list[tuple[str, str]]
) -> dict[str, Any]:
    groups = decay_groups(named, original)
    ids = iter(range(len(named)))
    param_groups = [{"params": [next(ids) for _ in group], "lr": 0.1, "step": 97} for group in groups]
    flat = [name for group in groups for name in group]
    states = {
        index: {kind: shard_of(original, kind, name, layout, tensor) for kind in KINDS[1:]}
        for index, name in enumerate(flat)
    }
    inner = {"state": states, "param_groups": param_groups}
    if layout.dtype == torch.float32:
        return inner
    masters = [[shard_of(original, "weight", name, layout, tensor) for name in group] for group in groups]
    return {"optimizer": inner, "fp32_from_fp16_params": masters, "grad_scaler": {"scale": torch.ones(1)}}
