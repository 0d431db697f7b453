"""What ZeRO++ (Wang et al. 2023, arXiv:2306.10209) needs beside DeepSpeed's dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from megatron.config.errors import ConfigError
from megatron.engine.settings import QUANTIZED_WEIGHTS, SECONDARY_PARTITION
from megatron.parallel.groups import ParallelGroups

QUANTUM = 8
"""The kernel that quantizes takes whole multiples of so many elements."""


def prepare_zero(model: nn.Module, zero: Mapping[str, Any], groups: ParallelGroups) -> None:
    """Make what the settings of ZeRO ask for and DeepSpeed would make wrongly, or fail without.

    Raises:
        ConfigError: a weight cannot be quantized.
    """
    size = zero.get(SECONDARY_PARTITION, 1)
    if size > 1:
        _make_secondary_group(groups, size)
    if zero.get(QUANTIZED_WEIGHTS):
        _require_whole_quanta(model, groups.replicas.size)


def forget_groups() -> None:
    """Clear DeepSpeed's globals, which outlive the engine they were made for."""
    deepspeed_groups.mpu = None
    deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def _make_secondary_group(groups: ParallelGroups, size: int) -> None:
    """Group `size` neighbours among the ranks that hold the same weights.

    DeepSpeed itself would take neighbours in the world, be they tensor ranks with other weights.
    """
    first = groups.replicas.rank // size * size
    ranks = list(groups.replicas.ranks[first : first + size])
    deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = dist.new_group(ranks, use_local_synchronization=True)


def _require_whole_quanta(model: nn.Module, replicas: int) -> None:
    for name, parameter in model.named_parameters():
        share = -(-parameter.numel() // replicas)
        if share % QUANTUM:
            raise ConfigError(
                [
                    f"--deepspeed_config: 'zero_optimization.{QUANTIZED_WEIGHTS}' quantizes multiples of {QUANTUM} "
                    f"elements, but each of {replicas} ranks has {share} of {name} {tuple(parameter.shape)}; change "
                    "the size of the model or the number of ranks, or remove it"
                ]
            )
