"""The model's full weights out of a checkpoint, without an engine: for generation and conversion."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.engine.checkpoint_files import read_file
from megatron.model.gpt import TIED_EMBEDDING
from megatron.parallel.sharding import Sharding, join_shards, slice_of

REPLICATED = "mp_rank_{:02d}_model_states.pt"
LAYER = "layer_{}-model_{}-model_states.pt"
SHARDED = "zero_pp_rank_{}_mp_rank_{:02d}_model_states.pt"


def load_module_weights(directory: Path, shardings: Mapping[str, Sharding] | None = None) -> dict[str, Tensor]:
    """Read the whole model's weights from what `Engine.save` wrote, whatever its ZeRO stage, stages and tensor ranks.

    Args:
        directory: the checkpoint.
        shardings: of each parameter, as `describe_sharding` tells them of the model built for any number of ranks: how
            tensor ranks divide it. Needed where there were several of them.

    Returns:
        name of parameter -> logical tensor on the CPU in the dtype of the forward pass.

    Raises:
        CheckpointError: files are missing or damaged, or do not hold the model that `shardings` describes.
    """
    if list(directory.glob(LAYER.format("*", "*"))):
        pattern, read = LAYER.format("00", "{:02d}"), _read_layers
    elif (directory / REPLICATED.format(0)).exists():
        pattern, read = REPLICATED, _read_replicated
    elif (directory / SHARDED.format(0, 0)).exists():
        pattern, read = SHARDED.replace("{}", "0"), _read_shards
    else:
        raise CheckpointError(
            f"{directory} holds no model weights: neither {REPLICATED.format(0)} nor {SHARDED.format(0, 0)} is there"
        )
    size = next(rank for rank in itertools.count() if not (directory / pattern.format(rank)).exists())
    return _join([read(directory, rank) for rank in range(size)], shardings, directory)


def _join(
    ranks: Sequence[dict[str, Tensor]], shardings: Mapping[str, Sharding] | None, directory: Path
) -> dict[str, Tensor]:
    """Put the tensor ranks' shards together; what is whole on each of them, the first rank's tells."""
    if len(ranks) == 1:
        return ranks[0]
    if shardings is None:
        raise CheckpointError(f"{directory} holds weights of {len(ranks)} tensor ranks: only their model can join them")
    joined = {}
    for name, first in ranks[0].items():
        if name not in shardings or shardings[name].dim is None:
            joined[name] = first
            continue
        sharding = replace(shardings[name], num_shards=len(ranks), rank=0)
        shards = [rank[name] for rank in ranks]
        expected = slice_of(first.new_empty(sharding.logical_shape, device="meta"), sharding).shape
        wrong = next((shard for shard in shards if shard.shape != expected), None)
        if wrong is not None:
            raise CheckpointError(
                f"{directory}: {name} has the shape {tuple(wrong.shape)} on one of {len(ranks)} tensor ranks, and the "
                f"model's is {tuple(expected)}: the checkpoint is of another model"
            )
        joined[name] = join_shards(shards, sharding)
    return joined


def _read_replicated(directory: Path, tensor_rank: int) -> dict[str, Tensor]:
    """Read what a tensor rank of the flat engine has, which its replicas hold whole."""
    return dict(read_file(directory / REPLICATED.format(tensor_rank), mmap=True)["module"])


def _read_layers(directory: Path, tensor_rank: int) -> dict[str, Tensor]:
    """Put a pipeline's weights together: one file a layer and tensor rank, with names inside of it."""
    # The files of the first stage come first, and hold its parameters' full names.
    groups = read_file(directory / REPLICATED.format(tensor_rank), mmap=True)["param_shapes"]
    tied = any(name.startswith(f"{TIED_EMBEDDING}.") for shapes in groups for name in shapes)
    weights: dict[str, Tensor] = {}
    for file in sorted(directory.glob(LAYER.format("*", f"{tensor_rank:02d}"))):
        index = int(file.name.split("_")[1].partition("-")[0])
        prefix = TIED_EMBEDDING if tied and index == 0 else str(index)
        weights |= {f"{prefix}.{name}": weight for name, weight in read_file(file, mmap=True).items()}
    return weights


def _read_shards(directory: Path, tensor_rank: int) -> dict[str, Tensor]:
    """Put a tensor rank's ZeRO-3 weights together: each replica has the same share of every parameter, in order."""
    first = read_file(directory / SHARDED.format(0, tensor_rank))
    dtype = _dtype_of_training(first["ds_config"])
    size = first["dp_world_size"]
    flats = [_flat_weights(directory, rank, tensor_rank, first["ds_config"]) for rank in range(size)]
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


def _flat_weights(directory: Path, rank: int, tensor_rank: int, settings: Mapping[str, Any]) -> Tensor:
    prefix = "bf16_" if settings["bf16"]["enabled"] else ""
    path = directory / f"{prefix}zero_pp_rank_{rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"
    groups = read_file(path, mmap=True)["optimizer_state_dict"]["fp32_flat_groups"]
    return torch.cat([group.detach().flatten() for group in groups])


def _dtype_of_training(settings: Mapping[str, Any]) -> torch.dtype:
    if settings["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if settings["fp16"]["enabled"] else torch.float32
