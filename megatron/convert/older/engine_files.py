"""Megatron-DeepSpeed's files, in a folder such as `global_step100`.

| file | content |
|---|---|
| `mp_rank_MM_model_states.pt` | flags (`args`), counters; `module`: the weights; without ZeRO `optimizer` |
| `layer_LL-model_TT-model_states.pt` | of a pipelined model, instead: the weights of layer LL on tensor rank TT |
| `zero_pp_rank_D_mp_rank_MM_model_states.pt` | ZeRO-3: as the first, without usable weights |
| `zero_pp_rank_D_mp_rank_MM_optim_states.pt` | see `zero_partitions` |

MM counts the tensor ranks of the first pipeline stage, then those of the next; D counts data-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.convert.older.groups import check_kinds, check_master, group_with_size, steps_of
from megatron.convert.older.names import flatten, inside_block, place_of
from megatron.convert.older.parts import MASTER, MOMENTS, WEIGHT, OlderCheckpoint, Part
from megatron.convert.older.pickles import plain, read_pickled
from megatron.convert.older.zero_partitions import Shapes, parameter_parts, read_partitions

MODEL_FILE = re.compile(r"(zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")

Named = dict[str, tuple[str, Tensor, Path]]
"""Place, weight and file of parameters by the names that the optimizer's state uses."""


def is_engine_folder(folder: Path) -> bool:
    """Whether these are Megatron-DeepSpeed's files."""
    return any(MODEL_FILE.fullmatch(path.name) for path in folder.glob("*mp_rank_*_model_states.pt"))


def is_staged(folder: Path) -> bool:
    """Whether the weights are in layer files, those of the model that was made for pipelines."""
    return any(LAYER_FILE.fullmatch(path.name) for path in folder.glob("layer_*.pt"))


def read_engine_files(folder: Path, admitted: Iterable[str] = (), *, optimizer: bool = True) -> OlderCheckpoint:
    """Read the folder of one step.

    Args:
        folder: it holds the files themselves.
        admitted: see `read_pickled`.
        optimizer: whether to read the optimizer's state; that of ZeRO-3 is read in any case, as it alone has the
            weights.

    Raises:
        CheckpointError: a file is missing, damaged or of a form that is not known.
    """
    admitted = tuple(admitted)
    paths = {
        int(match[2]): path
        for path in sorted(folder.glob("*mp_rank_*_model_states.pt"))
        if (match := MODEL_FILE.fullmatch(path.name))
    }
    states = {rank: read_pickled(path, admitted) for rank, path in sorted(paths.items())}
    if sorted(states) != list(range(len(states))):
        raise CheckpointError(f"{folder} has the model's ranks {sorted(states)}: copy all of the checkpoint")
    layers = _LayerFiles(folder, admitted) if is_staged(folder) else None
    first = states[0]
    checkpoint = OlderCheckpoint(
        file=paths[0],
        arguments={"deepspeed": True, **plain(first.get("args"))},
        iteration=int(first.get("iteration", first.get("global_steps", 0))),
        version=float(first.get("checkpoint_version", 0)),
        tensor_size=layers.tensor_size if layers else len(states),
    )
    _check_tensor_size(checkpoint, folder)
    if layers is not None:
        layers.add_weights(checkpoint)
    zero_3 = paths[0].name.startswith("zero_")
    for rank, state in states.items():
        named = (
            layers.named(rank % layers.tensor_size) if layers else _named(state, paths[rank], with_weights=not zero_3)
        )
        if not layers and not zero_3:
            for name, (place, weight, path) in named.items():
                checkpoint.add(place, WEIGHT, Part(path, name, tuple(weight.shape), (weight,)))
        if optimizer or zero_3:
            _add_optimizer(checkpoint, folder, rank, state, named, admitted)
    return checkpoint


def _named(state: Mapping[str, Any], path: Path, *, with_weights: bool) -> Named:
    module = state.get("module")
    if not with_weights:
        return {}
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{path} has no weights under `module`, and there are no layer files beside it")
    return {name: (_known(place_of(name), name, path), weight, path) for name, weight in flatten(module)}


def _known(place: str | None, name: str, path: Path) -> str:
    if place is None:
        raise CheckpointError(
            f"{path} holds {name}, for which there is no place in a GPT of this program: the model is another one"
        )
    return place


def _add_optimizer(
    checkpoint: OlderCheckpoint,
    folder: Path,
    rank: int,
    state: Mapping[str, Any],
    named: Named,
    admitted: Iterable[str],
) -> None:
    """Add one rank of the model's fp32 copies and moments."""
    path = named[next(iter(named))][2] if named else checkpoint.file
    weights = {name: weight for name, (_, weight, _) in named.items()}
    partitions = read_partitions(folder, rank, admitted)
    if partitions:
        parts = parameter_parts(partitions, _parameter_shapes(state), weights)
        steps = partitions[0].steps
    elif isinstance(state.get("optimizer"), Mapping):
        parts = _whole_groups(state["optimizer"], weights, path)
        steps = steps_of(state["optimizer"].get("optimizer_state_dict", state["optimizer"]))
    else:
        return
    for name, kind, part in parts:
        place = named[name][0] if name in named else _known(place_of(name), name, part.file)
        # What two stages share comes again with the last one, whose copy of the moments counts for nothing.
        if len(checkpoint.parts.get(place, {}).get(kind, ())) < checkpoint.tensor_size:
            checkpoint.add(place, kind, part)
    checkpoint.optimizer_steps = steps


def _whole_groups(
    saved: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> Iterator[tuple[str, str, Part]]:
    """Cut the groups of an optimizer without ZeRO, each one flat tensor, into parameters."""
    inner = saved.get("optimizer_state_dict", saved)
    masters = saved.get("fp32_groups_flat")
    if masters is None or "state" not in inner:
        raise CheckpointError(
            f"{path}: its `optimizer` has no fp32_groups_flat: its form is not known; import the weights alone, with "
            "--weights-only"
        )
    check_kinds(inner, path)
    for index, master in enumerate(masters):
        flat = {MASTER: master, **{kind: inner["state"][index][kind] for kind in MOMENTS if index in inner["state"]}}
        start = 0
        for name in group_with_size(weights, master.numel(), path):
            shape = tuple(weights[name].shape)
            end = start + weights[name].numel()
            check_master(weights[name], master.reshape(-1)[start:end], name, path)
            for kind, tensor in flat.items():
                yield name, kind, Part(path, f"{kind} of {name}", shape, (tensor.reshape(-1)[start:end],))
            start = end


def _parameter_shapes(state: Mapping[str, Any]) -> list[Shapes]:
    shapes = state.get("param_shapes")
    groups: Sequence[Mapping[str, Any]] = [shapes] if isinstance(shapes, Mapping) else shapes or []
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def _check_tensor_size(checkpoint: OlderCheckpoint, folder: Path) -> None:
    recorded = checkpoint.arguments.get("tensor_model_parallel_size", checkpoint.tensor_size)
    if recorded != checkpoint.tensor_size:
        raise CheckpointError(
            f"{folder} has files of {checkpoint.tensor_size} tensor ranks, but was saved by {recorded}: copy all of "
            "the checkpoint"
        )


class _LayerFiles:
    """The weights of a pipelined model, a file for each layer and tensor rank.

    What a layer is, its content says: the numbers differ between versions, which put steps without weights between.
    """

    def __init__(self, folder: Path, admitted: Iterable[str]) -> None:
        self._contents: dict[int, dict[int, dict[str, Tensor]]] = {}
        self._folder = folder
        for path in sorted(folder.glob("layer_*.pt")):
            if named := LAYER_FILE.fullmatch(path.name):
                content = dict(flatten(read_pickled(path, admitted)))
                self._contents.setdefault(int(named[1]), {})[int(named[2])] = content
        self.tensor_size = max(len(of_layer) for of_layer in self._contents.values())
        for layer, of_layer in self._contents.items():
            if sorted(of_layer) != list(range(self.tensor_size)):
                raise CheckpointError(
                    f"{folder} has layer {layer} of the tensor ranks {sorted(of_layer)} and other layers of "
                    f"{self.tensor_size} ranks: copy all of the checkpoint"
                )
        self._blocks = [layer for layer in sorted(self._contents) if self._is_block(layer)]

    def _is_block(self, layer: int) -> bool:
        return any(inside_block(name) for name in self._contents[layer][0])

    def path(self, layer: int, tensor: int) -> Path:
        """Name the file of a layer."""
        return self._folder / f"layer_{layer:02d}-model_{tensor:02d}-model_states.pt"

    def add_weights(self, checkpoint: OlderCheckpoint) -> None:
        """Add all weights to a checkpoint."""
        for tensor in range(self.tensor_size):
            for name, (place, weight, path) in self._layers(tensor):
                checkpoint.add(place, WEIGHT, Part(path, name.partition(".")[2], tuple(weight.shape), (weight,)))

    def named(self, tensor: int) -> Named:
        """Give the weights of a tensor rank under the names that its engine gave them.

        The layers' order is that of the names, but for a tied embedding: it comes first, as it does here.
        """
        result: Named = {}
        for name, found in self._layers(tensor):
            result[name] = found
            layer, _, inner = name.partition(".")
            if inner.startswith(("word_embeddings.", "position_embeddings.")):
                result[f"tied_modules.embed.{inner}"] = found
                if layer != str(min(self._contents)):
                    raise CheckpointError(f"{found[2]} is an embedding behind other layers: the model is another one")
        return result

    def _layers(self, tensor: int) -> Iterator[tuple[str, tuple[str, Tensor, Path]]]:
        for layer, of_layer in sorted(self._contents.items()):
            path = self.path(layer, tensor)
            for name, weight in of_layer[tensor].items():
                place = self._place(layer, name, weight)
                yield f"{layer}.{name}", (_known(place, name, path), weight, path)

    def _place(self, layer: int, name: str, weight: Tensor) -> str | None:
        if layer in self._blocks:
            inside = inside_block(name)
            return f"block.{self._blocks.index(layer)}.{inside}" if inside else None
        if name in {"weight", "bias"} and weight.dim() == 1:
            return f"norm.{name}"
        if name in {"lm_head.weight", "weight"}:
            return "head"
        return place_of(f"embedding.{name}")
