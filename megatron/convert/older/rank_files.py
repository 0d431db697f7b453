"""Megatron-LM's files: `iter_0000100/mp_rank_00/model_optim_rng.pt`, one for each tensor and pipeline rank.

| entry | content |
|---|---|
| `args` | the flags |
| `checkpoint_version`, `iteration` | 3.0 since 2021; missing in the oldest |
| `model` | the weights of the rank's stage, by name; before core in nested dictionaries |
| `model0`, `model1`, ... | instead of `model`: the parts of an interleaved stage |
| `optimizer` | Adam's state, `fp32_from_fp16_params`: in the order of the parameters, without names |

A stage counts its blocks from 0. With the distributed optimizer its state is in files of its own, divided over the
data-parallel ranks by bucket: that is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.convert.older.groups import check_kinds, check_master, group_with_shapes, steps_of
from megatron.convert.older.names import flatten, place_of
from megatron.convert.older.parts import MASTER, MOMENTS, WEIGHT, OlderCheckpoint, Part
from megatron.convert.older.pickles import plain, read_pickled

RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
FILES = ("model_optim_rng.pt", "model_rng.pt")
"""A rank's file: the second name where the optimizer has a file of its own."""

DISTRIBUTED = ("distrib_optim.pt", "optim.pt")


@dataclass(frozen=True)
class _Chunk:
    """The weights of consecutive blocks on one rank, and what comes before or after them."""

    weights: Mapping[str, Tensor]
    blocks: int


@dataclass(frozen=True)
class _RankFile:
    path: Path
    tensor: int
    pipeline: int
    content: Mapping[str, Any]
    chunks: tuple[_Chunk, ...]


def is_rank_folder(folder: Path) -> bool:
    """Whether these are Megatron-LM's files."""
    return any((path / name).is_file() for path in folder.glob("mp_rank_*") for name in FILES)


def read_rank_files(folder: Path, admitted: Iterable[str] = (), *, optimizer: bool = True) -> OlderCheckpoint:
    """Read the folder of one iteration.

    Args:
        folder: it holds the ranks' folders.
        admitted: see `read_pickled`.
        optimizer: whether to read the optimizer's state.

    Raises:
        CheckpointError: a file is missing, damaged or of a form that is not known.
    """
    files = [_open(path, admitted) for path in sorted(folder.glob("mp_rank_*")) if path.is_dir()]
    tensor_size, pipeline_size = (max(getattr(file, axis) for file in files) + 1 for axis in ("tensor", "pipeline"))
    by_place = {(file.tensor, file.pipeline): file for file in files}
    for tensor in range(tensor_size):
        for pipeline in range(pipeline_size):
            if (tensor, pipeline) not in by_place:
                raise CheckpointError(
                    f"{folder} lacks the file of tensor rank {tensor}, pipeline rank {pipeline}: "
                    "copy all of the checkpoint"
                )
    first = by_place[0, 0]
    checkpoint = OlderCheckpoint(
        file=first.path,
        arguments=plain(first.content.get("args")),
        iteration=_iteration(first.content),
        version=float(first.content.get("checkpoint_version", 0)),
        tensor_size=tensor_size,
    )
    _check_parallel_size(checkpoint.arguments, tensor_size, pipeline_size, folder)
    for tensor in range(tensor_size):
        stages = [by_place[tensor, pipeline] for pipeline in range(pipeline_size)]
        for file, places in zip(stages, _places(stages), strict=True):
            _add_weights(checkpoint, file, places)
            if optimizer:
                _add_optimizer(checkpoint, file, places)
    return checkpoint


def _open(folder: Path, admitted: Iterable[str]) -> _RankFile:
    named = RANK_FOLDER.fullmatch(folder.name)
    if named is None:
        raise CheckpointError(f"{folder} is called neither mp_rank_TT nor mp_rank_TT_PPP: what is it?")
    if named[3] is not None:
        raise CheckpointError(f"{folder} is of expert-parallel ranks, and mixtures of experts are not offered")
    path = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
    content = read_pickled(path, admitted)
    keys = [key for key in content if re.fullmatch(r"model\d*", key)]
    if not keys:
        raise CheckpointError(f"{path} has no entry `model`, only {', '.join(map(str, content))}: it holds no weights")
    chunks = tuple(_chunk(content[key], path) for key in sorted(keys))
    return _RankFile(path, int(named[1]), int(named[2] or 0), content, chunks)


def _chunk(entries: Any, path: Path) -> _Chunk:
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{path}: its `model` is a {type(entries).__name__} instead of weights by name")
    weights = dict(flatten(entries))
    blocks = {match[1] for name in weights if (match := re.search(r"\.layers\.(\d+)\.", f".{name}"))}
    return _Chunk(weights, len(blocks))


def _places(stages: Sequence[_RankFile]) -> list[dict[str, tuple[str, Tensor]]]:
    """Name what each stage's file holds: the place and the weight of every parameter, in order.

    Interleaved, chunk 0 of every stage comes before chunk 1 of any.
    """
    result: list[dict[str, tuple[str, Tensor]]] = [{} for _ in stages]
    first_block = 0
    for index in range(max(len(stage.chunks) for stage in stages)):
        for stage, places in zip(stages, result, strict=True):
            if index >= len(stage.chunks):
                raise CheckpointError(f"{stage.path} has {len(stage.chunks)} models, other stages have more")
            chunk = stage.chunks[index]
            for name, weight in chunk.weights.items():
                place = place_of(name, first_block)
                if place is None:
                    raise CheckpointError(
                        f"{stage.path} holds {name} of shape {tuple(weight.shape)}, for which there is no place in "
                        "a GPT of this program: the model is another one"
                    )
                places[f"{index}.{name}"] = (place, weight)
            first_block += chunk.blocks
    return result


def _add_weights(checkpoint: OlderCheckpoint, file: _RankFile, places: Mapping[str, tuple[str, Tensor]]) -> None:
    for name, (place, weight) in places.items():
        checkpoint.add(place, WEIGHT, Part(file.path, name.partition(".")[2], tuple(weight.shape), (weight,)))


def _add_optimizer(checkpoint: OlderCheckpoint, file: _RankFile, places: Mapping[str, tuple[str, Tensor]]) -> None:
    if separate := [name for name in DISTRIBUTED if (file.path.parent / name).is_file()]:
        raise CheckpointError(
            f"{file.path.parent / separate[0]} is of the distributed optimizer, whose buckets are not read: import the "
            "weights alone, with --weights-only, or save with the older system without --use-distributed-optimizer"
        )
    saved = file.content.get("optimizer")
    if saved is None:
        return
    inner = saved.get("optimizer", saved.get("optimizer_state_dict", saved)) if isinstance(saved, Mapping) else {}
    if not isinstance(inner, Mapping) or "param_groups" not in inner:
        raise CheckpointError(
            f"{file.path}: its `optimizer` has no param_groups: its form is not known; import the weights alone, with "
            "--weights-only"
        )
    check_kinds(inner, file.path)
    weights = {name: weight for name, (_, weight) in places.items()}
    masters = saved.get("fp32_from_fp16_params", saved.get("fp32_from_fp16"))
    for name, state in _by_parameter(inner, masters, weights, file.path):
        place, weight = places[name]
        for kind, tensor in state.items():
            if kind == MASTER:
                check_master(weight, tensor, name, file.path)
            part = Part(file.path, f"{kind} of {name.partition('.')[2]}", tuple(weight.shape), (tensor,))
            checkpoint.add(place, kind, part)
    checkpoint.optimizer_steps = steps_of(inner)


def _by_parameter(
    inner: Mapping[str, Any], masters: Sequence[Sequence[Tensor]] | None, weights: Mapping[str, Tensor], file: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Give each parameter's name with its master copy and moments."""
    states = inner["state"]
    for index, group in enumerate(inner["param_groups"]):
        ids = group["params"]
        held = [{kind: states[id][kind] for kind in MOMENTS if kind in states.get(id, {})} for id in ids]
        if masters is not None:
            if len(masters[index]) != len(ids):
                raise CheckpointError(
                    f"{file}: a group of its optimizer has {len(ids)} parameters and {len(masters[index])} fp32 copies:"
                    " parameters of several dtypes are not read; import the weights alone, with --weights-only"
                )
            held = [{MASTER: master, **state} for master, state in zip(masters[index], held, strict=True)]
        if not any(held):
            continue
        shapes = [tuple(next(iter(state.values())).shape) for state in held if state]
        names = group_with_shapes(weights, shapes, file)
        yield from zip(names, held, strict=True)


def _iteration(content: Mapping[str, Any]) -> int:
    return int(content.get("iteration", content.get("total_iters", 0)))


def _check_parallel_size(arguments: Mapping[str, Any], tensor: int, pipeline: int, folder: Path) -> None:
    recorded = arguments.get("tensor_model_parallel_size", arguments.get("model_parallel_size", tensor))
    stages = arguments.get("pipeline_model_parallel_size", pipeline)
    if (recorded, stages) != (tensor, pipeline):
        raise CheckpointError(
            f"{folder} has files of {tensor} tensor and {pipeline} pipeline ranks, but was saved by {recorded} and "
            f"{stages}: copy all of the checkpoint"
        )
