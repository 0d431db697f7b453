"""The weights of a checkpoint in a module without an engine: for generation, conversion and evaluation."""

from __future__ import annotations

import torch
from torch import nn

from megatron.checkpoint.fragments import WEIGHT, LogicalTensors
from megatron.checkpoint.ranges import shard_numel
from megatron.parallel.sharding import sharding_of


@torch.no_grad()
def load_weights(module: nn.Module, tensors: LogicalTensors) -> None:
    """Fill the parameters of a module, each with this rank's shard of it, cast to its dtype, on its device.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or a file is damaged.
    """
    for name, parameter in module.named_parameters():
        sharding = sharding_of(parameter)
        shard = tensors.read_range(name, WEIGHT, sharding, 0, shard_numel(sharding))
        parameter.copy_(shard.view(parameter.shape))
