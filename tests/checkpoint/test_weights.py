"""A module takes its weights from a checkpoint, in its own dtype, with its own padding."""

import torch
from torch import nn

from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.weights import load_weights
from megatron.checkpoint.whole import write_checkpoint
from megatron.parallel.groups import Group
from megatron.parallel.sharding import describe_sharding, mark_sharded


def test_a_module_is_filled_cast_and_padded(tmp_path):
    table, bias = torch.randn(6, 4), torch.randn(6)
    folder = write_checkpoint(
        tmp_path, [("weight", table), ("bias", bias)], config={}, iteration=1, paddings={"weight": 1}
    )
    module = nn.Linear(4, 8).bfloat16()
    module.bias = nn.Parameter(torch.empty(6))
    mark_sharded(module.weight, 0, Group.alone(), (8, 4), padding=3)
    load_weights(module, open_tensors(folder))
    assert torch.equal(module.weight[:5], table[:5].bfloat16())
    assert not module.weight[5:].any()
    assert torch.equal(module.bias, bias)


def test_a_module_that_was_made_without_memory_is_filled_by_the_marks_it_had(tmp_path):
    table = torch.randn(5, 4)
    folder = write_checkpoint(tmp_path, [("weight", table)], config={}, iteration=1)
    with torch.device("meta"):
        module = nn.Linear(4, 8, bias=False)
    mark_sharded(module.weight, 0, Group.alone(), (8, 4), padding=3)
    shardings = describe_sharding(module)
    load_weights(module.to_empty(device="cpu"), open_tensors(folder), shardings)
    assert torch.equal(module.weight[:5], table)
    assert not module.weight[5:].any()
