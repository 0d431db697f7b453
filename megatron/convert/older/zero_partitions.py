"""The optimizer's state as DeepSpeed divides it over data-parallel ranks: `zero_pp_rank_D_mp_rank_MM_optim_states.pt`.

| stage | a rank's entries |
|---|---|
| 1, 2, and bf16 with fp32 copies | `single_partition_of_fp32_groups`: one range of each group |
| 3 | `fp32_flat_groups`: its share of each parameter |

Under the first the ranks' ranges of a group, one after the other, are its parameters one after the other, then padding.
Under stage 3 a parameter is divided evenly over the ranks, rounded up, and a rank's shares follow one another through
its sub-groups.

`param_slice_mappings`, where it was saved, says which parameter each entry of a range belongs to; otherwise
`param_shapes` in the file of the weights does, in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.convert.older.groups import check_kinds, group_with_size, steps_of
from megatron.convert.older.parts import MASTER, MOMENTS, Part
from megatron.convert.older.pickles import Recorded, plain, read_pickled

PARTITION = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

ZERO_STAGES = ("disabled", "optimizer_states", "gradients", "weights")
"""Members of DeepSpeed's enumeration of stages, by their numbers."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Partition:
    """One data-parallel rank's share of the optimizer's state of one rank of the model."""

    path: Path
    rank: int
    state: Mapping[str, Any]

    @property
    def stage(self) -> int:
        """The ZeRO stage that saved it."""
        stage = self.state.get("zero_stage", 1)
        if isinstance(stage, Recorded):
            stage = stage.arguments[-1]  # its number; early releases of Python 3.11 pickled its class and name instead
        return ZERO_STAGES.index(stage) if stage in ZERO_STAGES else int(stage)

    def ranges(self, kind: str) -> list[Tensor]:
        """Give this rank's flat range of each group, or of each sub-group under stage 3."""
        if kind == MASTER:
            key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
            return list(self.state[key])
        optimizer = self.optimizer
        entries = optimizer["state"]
        return [entries[index][kind].reshape(-1) for index in sorted(entries) if kind in entries[index]]

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """The inner optimizer's `state_dict`; its ids count the groups, for each is one flat tensor to it."""
        state = self.state.get("base_optimizer_state", self.state.get("optimizer_state_dict"))
        if isinstance(state, list):  # the "elastic" form, a plain list of the groups
            state = {"state": dict(enumerate(state)), "step": self.state.get("base_optimizer_state_step")}
        return state if isinstance(state, Mapping) else {"state": {}}

    @property
    def steps(self) -> int | None:
        """Adam's count of steps."""
        optimizer = self.optimizer
        return steps_of(optimizer) if optimizer.get("step") is None else int(optimizer["step"])

    def slices(self, group: int) -> dict[str, tuple[int, int]] | None:
        """Where each parameter's entries start in the range of a group, and how many they are; None: not saved."""
        mappings = self.state.get("param_slice_mappings")
        if not mappings:
            return None
        addresses = {name: plain(address) for name, address in mappings[group].items()}
        return {name: (int(at["start"]), int(at["numel"])) for name, at in addresses.items()}


def read_partitions(folder: Path, model_rank: int, admitted: Iterable[str] = ()) -> list[Partition]:
    """Read the partitions of one rank of the model, in order of the data-parallel ranks; none where there are none.

    Raises:
        CheckpointError: some are missing or damaged.
    """
    partitions = []
    for path in folder.glob(f"*zero_pp_rank_*_mp_rank_{model_rank:02d}_optim_states.pt"):
        if named := PARTITION.fullmatch(path.name):
            content = read_pickled(path, admitted)
            state = content.get("optimizer_state_dict")
            if not isinstance(state, Mapping):
                raise CheckpointError(f"{path} has no optimizer_state_dict: it is no partition of an optimizer")
            partitions.append(Partition(path, int(named[1]), state))
    partitions.sort(key=lambda partition: partition.rank)
    if partitions:
        _check_complete(partitions)
    return partitions


def _check_complete(partitions: Sequence[Partition]) -> None:
    count = partitions[0].state.get("partition_count", len(partitions))
    expected = max(count) if isinstance(count, list | tuple) else int(count)
    missing = sorted(set(range(expected)) - {partition.rank for partition in partitions})
    if missing or len(partitions) != expected:
        raise CheckpointError(
            f"{partitions[0].path.parent} has {len(partitions)} of {expected} partitions of "
            f"{partitions[0].path.name.partition('rank_0')[2].strip('_') or 'the optimizer'}"
            f"{f', rank {missing[0]} among the missing' if missing else ''}: copy all of the checkpoint"
        )


def parameter_parts(
    partitions: Sequence[Partition], shapes: Sequence[Shapes], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Part]]:
    """Put the partitions together: name, kind and part of every parameter.

    Args:
        partitions: of all data-parallel ranks.
        shapes: `param_shapes`: by name, of each group; empty when it was not saved.
        weights: of the rank of the model, in the order of its definition, for when it was not.

    Raises:
        CheckpointError: they do not fit together.
    """
    check_kinds(partitions[0].optimizer, partitions[0].path)
    gather = _shares_of_stage_3 if partitions[0].stage == 3 else _ranges_of_stage_2
    for kind in (MASTER, *MOMENTS):
        ranges = [partition.ranges(kind) for partition in partitions]
        if not all(ranges):
            continue
        for name, shape, pieces in gather(partitions, ranges, shapes, weights):
            yield name, kind, Part(partitions[0].path, f"{kind} of {name}", shape, tuple(pieces))


def _ranges_of_stage_2(
    partitions: Sequence[Partition],
    ranges: Sequence[Sequence[Tensor]],
    shapes: Sequence[Shapes],
    weights: Mapping[str, Tensor],
) -> Iterator[tuple[str, tuple[int, ...], list[Tensor]]]:
    for group in range(len(ranges[0])):
        flat = [of_rank[group].detach().reshape(-1) for of_rank in ranges]
        known = shapes[group] if group < len(shapes) else _shapes_of_group(flat, weights, partitions[0].path)
        slices = [partition.slices(group) for partition in partitions]
        end = 0
        for name, shape in known.items():
            start, end = end, end + math.prod(shape)
            if any(of_rank is None for of_rank in slices):
                yield name, shape, list(_cut(flat, start, end))
            else:
                held = [
                    (tensor, of_rank[name])
                    for tensor, of_rank in zip(flat, slices, strict=True)
                    if of_rank and name in of_rank
                ]
                yield name, shape, [tensor[first : first + count] for tensor, (first, count) in held]


def _shapes_of_group(flat: Sequence[Tensor], weights: Mapping[str, Tensor], file: Path) -> Shapes:
    names = group_with_size(weights, sum(tensor.numel() for tensor in flat), file)
    return {name: tuple(weights[name].shape) for name in names}


def _shares_of_stage_3(
    partitions: Sequence[Partition],
    ranges: Sequence[Sequence[Tensor]],
    shapes: Sequence[Shapes],
    weights: Mapping[str, Tensor],
) -> Iterator[tuple[str, tuple[int, ...], list[Tensor]]]:
    del weights
    if not shapes:
        raise CheckpointError(
            f"{partitions[0].path} is of ZeRO-3, but the files of the weights have no param_shapes: the version of "
            "DeepSpeed that saved it is too old, gather the weights with its zero_to_fp32.py"
        )
    flat = [[tensor.detach().reshape(-1) for tensor in of_rank] for of_rank in ranges]
    end = 0
    for name, shape in (item for group in shapes for item in group.items()):
        entries = math.prod(shape)
        start, end = end, end - (-entries // len(flat))
        pieces = []
        for rank, of_rank in enumerate(flat):
            before = rank * (end - start)
            pieces += list(_cut(of_rank, start, start + max(min(end - start, entries - before), 0)))
        yield name, shape, pieces


def _cut(tensors: Sequence[Tensor], start: int, end: int) -> Iterator[Tensor]:
    """Cut entries [start, end) out of tensors that follow one another."""
    before = 0
    for tensor in tensors:
        first, last = max(start - before, 0), min(end - before, tensor.numel())
        if first < last:
            yield tensor[first:last]
        before += tensor.numel()
