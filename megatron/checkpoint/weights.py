"""The weights of a checkpoint in a module without an engine: for generation, conversion and evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatron.checkpoint.fragments import WEIGHT, LogicalTensors
from megatron.checkpoint.ranges import shard_numel
from megatron.parallel.sharding import Sharding, sharding_of


@torch.no_grad()
def load_weights(module: nn.Module, tensors: LogicalTensors, shardings: Mapping[str, Sharding] | None = None) -> None:
    """Fill the parameters of a module, each with this rank's shard of it, cast to its dtype, on its device.

    Args:
        module: takes the weights.
        tensors: of a checkpoint.
        shardings: of its parameters, as `describe_sharding` told them before the module left the device "meta", where
            it loses the marks of its layers.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or a file is damaged.
    """
    for name, parameter in module.named_parameters():
        sharding = sharding_of(parameter) if shardings is None else shardings[name]
        shard = tensors.read_range(name, WEIGHT, sharding, 0, shard_numel(sharding))
        parameter.copy_(shard.view(parameter.shape))
