"""Optimizer state that is saved in order, without names: which entry belongs to which parameter.

The older systems put the parameters of a rank into two groups, those with weight decay and those without (biases, and
whatever has one dimension), each in the order in which the model defines them, which is that of its saved weights. A
group is recognised by its sizes, and the fp32 master copies are compared to the weights: rounded to the weights' dtype
they are equal, bit for bit, or the order is another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError

Named = Mapping[str, Tensor]


def parameter_groups(weights: Named) -> list[list[str]]:
    """Divide a rank's parameters as the older systems do, and as they do when everything decays."""
    bare = [name for name, tensor in weights.items() if tensor.dim() == 1 or name.endswith(".bias")]
    decaying = [name for name in weights if name not in set(bare)]
    return [group for group in (decaying, bare, list(weights)) if group]


def group_with_shapes(weights: Named, shapes: Sequence[tuple[int, ...]], file: Path) -> list[str]:
    """Find the group whose parameters have these shapes, in order.

    Raises:
        CheckpointError: there is none.
    """
    for group in parameter_groups(weights):
        if [tuple(weights[name].shape) for name in group] == list(shapes):
            return group
    raise CheckpointError(
        f"{file}: its optimizer holds a group of {len(shapes)} tensors, in an order that is not that of the weights: "
        "import the weights alone, with --weights-only"
    )


def group_with_size(weights: Named, entries: int, file: Path) -> list[str]:
    """Find the group whose parameters have so many entries together, up to the few that pad it.

    Raises:
        CheckpointError: there is none.
    """
    for group in parameter_groups(weights):
        held = sum(math.prod(weights[name].shape) for name in group)
        if held <= entries < held + PADDING:
            return group
    raise CheckpointError(
        f"{file}: its optimizer holds a group of {entries} entries, which none of the model's has: import the weights "
        "alone, with --weights-only"
    )


PADDING = 256
"""Entries that may follow a flat group: less than this, for the engines align them."""


def check_master(weight: Tensor, master: Tensor, name: str, file: Path) -> None:
    """Compare an fp32 master copy to the weight that it should round to.

    Raises:
        CheckpointError: they differ.
    """
    if not torch.equal(master.detach().reshape(-1).to(weight.dtype), weight.detach().reshape(-1)):
        raise CheckpointError(
            f"{file}: the fp32 copy of {name} in the optimizer is not that of the weight: the optimizer's order is "
            "another one; import the weights alone, with --weights-only"
        )


def check_kinds(state: Mapping[str, Any], file: Path) -> None:
    """Check that an optimizer's `state_dict` is Adam's, whose moments are what is read.

    Raises:
        CheckpointError: it keeps other tensors.
    """
    kept = {kind: value for entry in state.get("state", {}).values() for kind, value in entry.items()}
    others = [kind for kind, value in kept.items() if kind not in KNOWN_STATE and isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{file}: its optimizer keeps {others[0]} of each parameter, so it is not Adam: import the weights alone, "
            "with --weights-only"
        )


KNOWN_STATE = frozenset({"exp_avg", "exp_avg_sq", "step"})


def steps_of(state: Mapping[str, Any]) -> int | None:
    """Find Adam's count of steps in an optimizer's `state_dict`; None when it holds none."""
    entries = state.get("state", {})
    held = [entry for entry in entries.values() if isinstance(entry, Mapping)]
    for place in (*held, *state.get("param_groups", ())):
        if "step" in place:
            return int(place["step"])
    return None
