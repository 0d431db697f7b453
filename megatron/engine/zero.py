"""ZeRO-3's weights, divided from the first moment on, and what ZeRO++ needs beside DeepSpeed's dictionary."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from megatron.config.errors import ConfigError
from megatron.engine.launch import quiet_stdout
from megatron.engine.mpu import DeepSpeedGroups
from megatron.engine.settings import QUANTIZED_WEIGHTS, SECONDARY_PARTITION
from megatron.parallel.groups import ParallelGroups

QUANTUM = 8
"""The kernel that quantizes takes whole multiples of so many elements."""


_LINEAR = F.linear
"""As torch has it: ZeRO-3 replaces it for the whole process."""


def divide_weights(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any], groups: ParallelGroups
) -> None:
    """Give a model its weights, one after the other, of each of which a rank keeps its share: as ZeRO-3 has them.

    At no time is there more in memory than the shares and one weight. DeepSpeed would take a whole model to divide.

    Args:
        model: made on the "meta" device, so that it takes no memory; its parameters are replaced.
        weights: name of each parameter and this tensor rank's part of it, on the device of the training.
        settings: DeepSpeed's dictionary, from `build_settings`, with ZeRO-3.
        groups: the ranks that share the work.

    Raises:
        ConfigError: a weight cannot be quantized.
    """
    prepare_zero(model, settings["zero_optimization"], groups)
    with quiet_stdout():
        deepspeed.init_distributed(dist_init_required=False)  # its own handle of the running process group
        mpu = DeepSpeedGroups(groups)
        divide = deepspeed.zero.Init(
            module=nn.Module(),  # nothing to divide yet, but it puts ZeRO-3's own product in place
            data_parallel_group=mpu.get_data_parallel_group(),
            config_dict_or_path=copy.deepcopy(dict(settings)),
            mpu=mpu,
            zero_param_parallel_group=deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP,
        )
    for name, weight in weights:
        owner_name, _, own_name = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        empty = owner.get_parameter(own_name)
        parameter = nn.Parameter(weight.to(_dtype_of(settings)).contiguous(), requires_grad=empty.requires_grad)
        parameter.__dict__.update(empty.__dict__)  # the marks of its layer
        owner.register_parameter(own_name, parameter)
        divide._convert_to_zero_parameters([parameter])


def _dtype_of(settings: Mapping[str, Any]) -> torch.dtype:
    if settings["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if settings["fp16"]["enabled"] else torch.float32


def prepare_zero(model: nn.Module, zero: Mapping[str, Any], groups: ParallelGroups) -> None:
    """Make what the settings of ZeRO++ (Wang et al. 2023, arXiv:2306.10209) need, which DeepSpeed would make wrongly.

    A second call for the same model changes nothing.

    Raises:
        ConfigError: a weight cannot be quantized.
    """
    size = zero.get(SECONDARY_PARTITION, 1)
    if size > 1 and deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is None:
        _make_secondary_group(groups, size)
    if zero.get(QUANTIZED_WEIGHTS):
        _require_whole_quanta(model, groups.replicas.size)


def restore_globals() -> None:
    """Undo what DeepSpeed changes in the process for an engine, and leaves there."""
    deepspeed_groups.mpu = None
    deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    F.linear = _LINEAR


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
