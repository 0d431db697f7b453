"""Which parameters decay, and by how much each group scales the learning rate and the weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def build_param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay, vectors (biases and norm weights) do not.

    Each group carries `lr_mult` and `wd_mult`, the factors on the schedules' values of a step. A group without
    parameters is left out. A parameter that ZeRO-3 has already split counts by its full shape.
    """
    decaying: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            (free if is_vector else decaying).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decaying, "lr_mult": 1.0, "wd_mult": 1.0},
        {"params": free, "lr_mult": 1.0, "wd_mult": 0.0},
    ]
    return [group for group in groups if group["params"]]
