"""The model's full weights out of a checkpoint, without an engine: for generation and conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.engine.checkpoint_files import read_file
from megatron.engine.interface import CheckpointError
from megatron.model.gpt import TIED_EMBEDDING

REPLICATED = "mp_rank_00_model_states.pt"
LAYER = "layer_{}-model_{}-model_states.pt"
SHARDED = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


def load_module_weights(directory: Path) -> dict[str, Tensor]:
    """Read the whole model's weights from what `Engine.save` wrote, whatever its ZeRO stage or number of stages.

    Returns:
        name of parameter -> tensor on the CPU in the dtype of the forward pass.

    Raises:
        CheckpointError: files are missing or damaged, or the weights are split over tensor ranks.
    """
    layers = sorted(directory.glob(LAYER.format("*", "00")))
    ranks = REPLICATED.replace("_00_", "_01_")
    if (directory / (LAYER.format("00", "01") if layers else ranks)).exists():
        raise CheckpointError(f"{directory} holds weights that are split over tensor ranks: convert it first")
    if layers:
        return _merge_layers(directory, layers)
    if (directory / REPLICATED).exists():
        module: dict[str, Tensor] = read_file(directory / REPLICATED, mmap=True)["module"]
        return dict(module)
    if (directory / SHARDED.format(0)).exists():
        return _merge_shards(directory)
    raise CheckpointError(f"{directory} holds no model weights: neither {REPLICATED} nor {SHARDED.format(0)} is there")


def _merge_layers(directory: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """Put a pipeline's weights together: one file a layer, with names inside of it."""
    groups = read_file(directory / REPLICATED, mmap=True)["param_shapes"]  # of the first stage, under their full names
    tied = any(name.startswith(f"{TIED_EMBEDDING}.") for shapes in groups for name in shapes)
    weights: dict[str, Tensor] = {}
    for file in files:
        index = int(file.name.split("_")[1].partition("-")[0])
        prefix = TIED_EMBEDDING if tied and index == 0 else str(index)
        weights |= {f"{prefix}.{name}": weight for name, weight in read_file(file, mmap=True).items()}
    return weights


def _merge_shards(directory: Path) -> dict[str, Tensor]:
    """Put ZeRO-3's weights together: each rank has the same share of every parameter, one after another."""
    first = read_file(directory / SHARDED.format(0))
    dtype = _dtype_of_training(first["ds_config"])
    size = first["dp_world_size"]
    flats = [_flat_weights(directory, rank, first["ds_config"]) for rank in range(size)]
    weights: dict[str, Tensor] = {}
    offset = 0
    for shapes in first["param_shapes"]:
        for name, shape in shapes.items():
            share = -(-shape.numel() // size)  # the last share is padded
            whole = torch.cat([flat[offset : offset + share] for flat in flats])[: shape.numel()]
            weights[name] = whole.view(shape).to(dtype)
            offset += share
    for name, source in first["shared_params"].items():
        weights[name] = weights[source]
    buffers = {name: first["module"][name] for name in first["buffer_names"]}
    return weights | buffers


def _flat_weights(directory: Path, rank: int, settings: Mapping[str, Any]) -> Tensor:
    prefix = "bf16_" if settings["bf16"]["enabled"] else ""
    path = directory / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    groups = read_file(path, mmap=True)["optimizer_state_dict"]["fp32_flat_groups"]
    return torch.cat([group.detach().flatten() for group in groups])


def _dtype_of_training(settings: Mapping[str, Any]) -> torch.dtype:
    if settings["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if settings["fp16"]["enabled"] else torch.float32
