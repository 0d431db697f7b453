"""Where DeepSpeed keeps what a checkpoint holds: views of the fp32 master weights and of the optimizer's states.

Every wrapper that DeepSpeed puts around an optimizer lets it step flat tensors, in which the parameters of a rank lie
one after the other, each with the part of it that is this rank's: all of it without ZeRO, a range of the flattened
parameter with it. The optimizer's states are as long as the flat tensor that they belong to. So one list of places
tells what to write, and where to put what is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import WEIGHT, Fragment, LogicalTensors
from megatron.checkpoint.ranges import is_whole
from megatron.parallel.groups import Group, ParallelGroups
from megatron.parallel.sharding import Sharding

ADAM = ("exp_avg", "exp_avg_sq")
SGD = ("momentum_buffer",)
READING_THREADS = 4


@dataclass(frozen=True)
class Place:
    """Where this rank keeps its part of a parameter.

    Attributes:
        name: of the parameter.
        sharding: of the parameter over the tensor ranks.
        start: first entry of the part, in the flattened shard.
        length: number of its entries.
        flat: the tensor that the optimizer steps.
        offset: where the part begins in it.
        written: those of the entries, counted from `start`, that this rank writes of all that hold them alike.
    """

    name: str
    sharding: Sharding
    start: int
    length: int
    flat: Tensor
    offset: int
    written: range

    def view(self, tensor: Tensor) -> Tensor:
        """View the part in `flat`, or in a state that is as long."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


def fragments_of(module: nn.Module, optimizer: Any, groups: ParallelGroups) -> Iterator[Fragment]:
    """Give what this rank writes of the weights and of the optimizer's states, as views.

    Args:
        module: of DeepSpeed's engine.
        optimizer: of DeepSpeed's engine.
        groups: the ranks that share the work.
    """
    state = stepped_by(optimizer).state
    for place in places_of(module, optimizer, groups):
        if not len(place.written):
            continue
        kept = {WEIGHT: place.flat, **_states(state.get(place.flat, {}), place.flat)}
        for kind, tensor in kept.items():
            part = place.view(tensor)[place.written.start : place.written.stop]
            yield Fragment(place.name, kind, place.sharding, place.start + place.written.start, part)


def places_of(module: nn.Module, optimizer: Any, groups: ParallelGroups) -> Iterator[Place]:
    """Tell where this rank keeps its part of each parameter of which it has one."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        found = _in_subgroups(optimizer, groups.replicas)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        found = _in_partitions(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    elif isinstance(optimizer, BF16_Optimizer):
        found = _in_partitions(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    else:
        found = ((parameter, 0, parameter.numel(), parameter, 0) for parameter in _parameters(optimizer))
    names = {parameter: name for name, parameter in module.named_parameters()}
    for parameter, start, length, flat, offset in found:
        sharding = _sharding_of(parameter)
        alike = flat is parameter  # without ZeRO, on each replica
        written = _share(length, groups.replicas) if alike else range(length)
        if (groups.tensor.rank > 0 and is_whole(sharding)) or getattr(parameter, "ds_pipe_replicated", False):
            written = range(0)  # the first tensor rank writes it, or the first of the stages that share it
        yield Place(names[parameter], sharding, start, length, flat, offset, written)


def stepped_by(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed has wrapped; itself when there is no wrapper."""
    wrapped: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return wrapped


def kinds_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Name the states that an optimizer keeps for each entry of a weight."""
    if type_of(optimizer) == "sgd":
        return SGD if any(group["momentum"] for group in optimizer.param_groups) else ()
    return ADAM


def type_of(optimizer: torch.optim.Optimizer) -> str:
    """Name an optimizer as its flag does, be it torch's or one of DeepSpeed's own."""
    return "sgd" if isinstance(optimizer, torch.optim.SGD) else "adam"


def step_of(optimizer: torch.optim.Optimizer) -> int:
    """Count the updates that the optimizer has made; 0 for one that does not count.

    Raises:
        CheckpointError: weights differ in it, which a checkpoint cannot say.
    """
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    if len(steps) > 1:
        raise CheckpointError(
            f"the optimizer has made {sorted(steps)} updates of different weights: it cannot be saved"
        )
    return next(iter(steps), 0)


def read_places(
    module: nn.Module,
    optimizer: Any,
    groups: ParallelGroups,
    tensors: LogicalTensors,
    step: int | None,
) -> None:
    """Fill this rank's master weights and states with what a checkpoint holds, whatever layout wrote it.

    Args:
        module: of DeepSpeed's engine.
        optimizer: of DeepSpeed's engine.
        groups: the ranks that share the work.
        tensors: of the checkpoint.
        step: number of updates after which the states were saved; without it they start anew.

    Raises:
        CheckpointError: the checkpoint lacks a tensor or a kind, or has another shape of it.
    """
    inner = stepped_by(optimizer)
    kinds = () if step is None else kinds_of(inner)
    copies: list[tuple[Place, str, Tensor]] = []
    for place in places_of(module, optimizer, groups):
        state = _prepared_state(inner, place.flat, kinds, step)
        copies += [(place, WEIGHT, place.flat), *((place, kind, state[kind]) for kind in kinds)]

    def read(copy: tuple[Place, str, Tensor]) -> None:
        place, kind, tensor = copy
        place.view(tensor).copy_(tensors.read_range(place.name, kind, place.sharding, place.start, place.length))

    with ThreadPoolExecutor(READING_THREADS) as threads:
        for _ in threads.map(read, copies):  # raises what a thread has raised
            pass
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed would keep views of the states before


def refresh_weights(optimizer: Any) -> None:
    """Make the weights of the forward pass from the master weights; the ranks that share them do it together."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        optimizer.update_lp_params()


def _in_subgroups(
    optimizer: DeepSpeedZeroOptimizer_Stage3, replicas: Group
) -> Iterator[tuple[nn.Parameter, int, int, Tensor, int]]:
    """ZeRO-3: each parameter is cut in equal shares, of which the last ends in padding."""
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = min(replicas.rank * share, parameter.ds_numel)
            length = min(share, parameter.ds_numel - start)
            if length:
                yield parameter, start, length, flat, offset
            offset += share


def _in_partitions(
    groups: list[list[nn.Parameter]], flats: list[Tensor]
) -> Iterator[tuple[nn.Parameter, int, int, Tensor, int]]:
    """ZeRO-1 and 2: the parameters of a group lie in a row, which is cut in equal parts."""
    for parameters, flat in zip(groups, flats, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield parameter, part.start, part.numel, flat, place.start


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _sharding_of(parameter: nn.Parameter) -> Sharding:
    """Return the mark of a parameter; one without is whole, and ZeRO-3 has emptied it."""
    marked: Sharding | None = getattr(parameter, "sharding", None)
    return marked or Sharding(logical_shape=tuple(getattr(parameter, "ds_shape", parameter.shape)), dim=None)


def _share(length: int, replicas: Group) -> range:
    """Return the entries that this one writes of what all replicas hold alike."""
    share = -(-length // replicas.size)
    return range(min(replicas.rank * share, length), min((replicas.rank + 1) * share, length))


def _states(state: Mapping[str, Any], flat: Tensor) -> dict[str, Tensor]:
    """Return what of an optimizer's state has a value for each entry."""
    return {
        kind: value for kind, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape != ()
    }


def _prepared_state(
    optimizer: torch.optim.Optimizer, flat: Tensor, kinds: tuple[str, ...], step: int | None
) -> dict[str, Any]:
    """Make the state of a flat tensor as the optimizer would in its first step; without kinds it has none yet."""
    if not kinds:
        optimizer.state.pop(flat, None)
        return {}
    state = optimizer.state[flat]
    for kind in kinds:
        if not isinstance(state.get(kind), Tensor):
            state[kind] = torch.zeros_like(flat, requires_grad=False)
    if type_of(optimizer) == "adam":
        state["step"] = _step_value(optimizer, flat, step or 0)
    return state


def _step_value(optimizer: torch.optim.Optimizer, flat: Tensor, step: int) -> Tensor | int:
    """Write Adam's count as the optimizer itself does: a number, or a tensor beside the states or on the host."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return step
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(step), dtype=torch.float32, device=flat.device if on_device else "cpu")
