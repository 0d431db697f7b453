"""Writes checkpoints as the older systems do, from a model of this program: what their documentation and files show."""

from __future__ import annotations

import argparse
import enum
import math
import random
import sys
import types
from collections import OrderedDict
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
                state[key] = _chunk(original, layout, tensor, first, first + chunk_size, named)
            if layout.optimizer:
                state["optimizer"] = _megatron_optimizer(original, layout, tensor, named)
            name = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if layout.pipeline > 1 else "")
            (folder / name).mkdir(parents=True)
            torch.save(state, folder / name / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("100")
    return root


def _chunk(
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


def write_flat_engine(
    original: Original, root: Path, layout: Layout, stage: int, *, mappings: bool = True, **changes: Any
) -> Path:
    """Write Megatron-DeepSpeed's files of a model without pipeline, under a ZeRO stage."""
    folder = root / "global_step100"
    folder.mkdir(parents=True)
    for tensor in range(layout.tensor):
        named: list[tuple[str, str]] = []
        module = _chunk(original, layout, tensor, 0, original.config.num_layers, named)
        paths = engine_names(original, layout)
        shapes = _group_shapes(original, layout, tensor, named, paths)
        state = {
            "module": module if stage < 3 else OrderedDict(),
            "param_shapes": shapes if stage else None,
            "args": older_arguments(original, layout, deepspeed=True, **changes),
            "checkpoint_version": layout.version,
            "iteration": 100,
            "ds_version": "0.9.5",
        }
        if stage == 0:
            state["optimizer"] = _whole_groups(original, layout, tensor, named)
        else:
            write_partitions(folder, original, layout, tensor, tensor, named, paths, stage, mappings=mappings)
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        torch.save(state, folder / f"{prefix}mp_rank_{tensor:02d}_model_states.pt")
    (root / "latest").write_text("global_step100")
    return root


def write_staged_engine(original: Original, root: Path, layout: Layout, **changes: Any) -> Path:
    """Write Megatron-DeepSpeed's files of the pipelined model under ZeRO-1."""
    folder = root / "global_step100"
    folder.mkdir(parents=True)
    layers = original.config.num_layers
    paths = {}
    for name in original.tensors["weight"]:
        paths[name] = _staged_name(name, layers, original.tied, layout)
    for tensor in range(layout.tensor):
        files: dict[str, dict[str, Tensor]] = {}
        for name, path in paths.items():
            index, _, inner = path.replace("tied_modules.embed", "1").partition(".")
            weight = shard_of(original, "weight", name, layout, tensor).to(layout.dtype)
            files.setdefault(index, {})[inner] = weight
        for index, content in files.items():
            torch.save(content, folder / f"layer_{int(index):02d}-model_{tensor:02d}-model_states.pt")
        for stage in range(layout.pipeline):
            size = layers // layout.pipeline
            names = stage_names(original, stage * size, (stage + 1) * size)
            if stage == layout.pipeline - 1 and stage and original.tied:
                names.append("tied_modules.word_embeddings.weight")
            named = [(name, paths[name]) for name in names]
            model_rank = stage * layout.tensor + tensor
            state = {
                "module": None,
                "param_shapes": _group_shapes(original, layout, tensor, named, paths),
                "args": older_arguments(original, layout, deepspeed=True, **changes),
                "checkpoint_version": layout.version,
                "iteration": 100,
            }
            torch.save(state, folder / f"mp_rank_{model_rank:02d}_model_states.pt")
            write_partitions(folder, original, layout, tensor, model_rank, named, paths, 1, mappings=True)
    (root / "latest").write_text("global_step100")
    return root


def _staged_name(name: str, layers: int, tied: bool, layout: Layout) -> str:
    stage, _, inner = name.partition(".")
    embedding = "tied_modules.embed" if tied else "1"
    if name in {"tied_modules.word_embeddings.weight", "0.weight"}:
        return f"{embedding}.word_embeddings.weight"
    if name == "1.table.weight":
        return f"{embedding}.position_embeddings.weight"
    if int(stage) == layers + 3:
        return f"{stage}.lm_head.weight"
    if int(stage) == layers + 2:
        return name
    stem, _, kind = inner.rpartition(".")
    return f"{stage}.{layout.names[stem]}.{kind}"


def engine_names(original: Original, layout: Layout) -> dict[str, str]:
    layers = original.config.num_layers
    return {
        name: "language_model." + ".".join(old_name(name, layout, layers, 0)) for name in original.tensors["weight"]
    }


def _group_shapes(
    original: Original, layout: Layout, tensor: int, named: list[tuple[str, str]], paths: dict[str, str]
) -> list[OrderedDict[str, torch.Size]]:
    return [
        OrderedDict((paths[name], shard_of(original, "weight", name, layout, tensor).shape) for name in group)
        for group in decay_groups(named, original)
    ]


def _whole_groups(original: Original, layout: Layout, tensor: int, named: list[tuple[str, str]]) -> dict[str, Any]:
    groups = decay_groups(named, original)

    def flat(kind: str, group: list[str]) -> Tensor:
        return torch.cat([shard_of(original, kind, name, layout, tensor).flatten() for name in group])

    states = {index: {kind: flat(kind, group) for kind in KINDS[1:]} for index, group in enumerate(groups)}
    inner = {"state": states, "param_groups": [{"params": [0], "step": 97}, {"params": [1], "step": 97}]}
    masters = [flat("weight", group) for group in groups]
    return {"optimizer_state_dict": inner, "fp32_groups_flat": masters, "dynamic_loss_scale": True}


def write_partitions(
    folder: Path,
    original: Original,
    layout: Layout,
    tensor: int,
    model_rank: int,
    named: list[tuple[str, str]],
    paths: dict[str, str],
    stage: int,
    *,
    mappings: bool,
) -> None:
    """Write each data-parallel rank's share of the optimizer's state."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    groups = decay_groups(named, original)
    cut = _shares_of_stage_3 if stage == 3 else _ranges_of_stage_2
    by_kind = {
        kind: [
            cut([shard_of(original, kind, name, layout, tensor).flatten() for name in group], layout.data)
            for group in groups
        ]
        for kind in KINDS
    }
    for rank in range(layout.data):
        states = {
            index: {"step": 97, **{kind: by_kind[kind][index][rank] for kind in KINDS[1:]}}
            for index in range(len(groups))
        }
        inner = {"state": states, "param_groups": [{"params": [index]} for index in range(len(groups))]}
        masters = [of_group[rank] for of_group in by_kind["weight"]]
        state: dict[str, Any] = {
            "zero_stage": ZeroStageEnum(stage),
            "partition_count": layout.data if stage == 3 else [layout.data] * len(groups),
            "loss_scaler": LossScaler(scale=1.0),
        }
        if stage == 3:
            state |= {"fp32_flat_groups": masters, "optimizer_state_dict": inner}
        else:
            state |= {"single_partition_of_fp32_groups": masters, "base_optimizer_state": inner}
            if mappings:
                shapes = _group_shapes(original, layout, tensor, named, paths)
                state["param_slice_mappings"] = [
                    _mapping(of_group, masters[index].numel(), rank) for index, of_group in enumerate(shapes)
                ]
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_{model_rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.9.5"}, folder / name)


def _mapping(shapes: OrderedDict[str, torch.Size], size: int, rank: int) -> OrderedDict[str, Any]:
    from deepspeed.utils.tensor_fragment import fragment_address

    result, start = OrderedDict(), 0
    for name, shape in shapes.items():
        first, last = max(start, rank * size), min(start + shape.numel(), (rank + 1) * size)
        if first < last:
            result[name] = fragment_address(start=first - rank * size, numel=last - first)
        start += shape.numel()
    return result


def _ranges_of_stage_2(tensors: list[Tensor], ranks: int) -> list[Tensor]:
    flat = torch.cat(tensors)
    padded = torch.cat([flat, torch.zeros(-flat.numel() % (2 * ranks))])
    return [part.clone() for part in padded.chunk(ranks)]


def _shares_of_stage_3(tensors: list[Tensor], ranks: int) -> list[Tensor]:
    shares: list[list[Tensor]] = [[] for _ in range(ranks)]
    for tensor in tensors:
        padded = torch.cat([tensor, torch.zeros(-tensor.numel() % ranks)])
        for share, part in zip(shares, padded.chunk(ranks), strict=True):
            share.append(part)
    return [torch.cat(share) for share in shares]
