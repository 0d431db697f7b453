"""Writes checkpoints as Megatron-DeepSpeed does, flat and pipelined, under every ZeRO stage."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.convert.older.older_writer import (
    KINDS,
    Layout,
    Original,
    decay_groups,
    old_name,
    older_arguments,
    shard_of,
    stage_names,
    stage_state,
)


def write_flat_engine(
    original: Original, root: Path, layout: Layout, stage: int, *, mappings: bool = True, **changes: Any
) -> Path:
    """Write Megatron-DeepSpeed's files of a model without pipeline, under a ZeRO stage."""
    folder = root / "global_step100"
    folder.mkdir(parents=True)
    for tensor in range(layout.tensor):
        named: list[tuple[str, str]] = []
        module = stage_state(original, layout, tensor, 0, original.config.num_layers, named)
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
