"""ZeRO-3's weights at the start, and ZeRO++: groups of ranks with the same weights, weights that can be quantized."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron.config.errors import ConfigError
from megatron.parallel.groups import ParallelGroups, create_groups
from megatron.parallel.mesh import Mesh
from tests.engine import toy
from tests.ranks import run_on_ranks


def secondary_groups():
    from deepspeed.utils import groups as deepspeed_groups

    from megatron.engine.zero import prepare_zero, restore_globals

    found = []
    for mesh in (Mesh(data=4), Mesh(data=2, tensor=2), Mesh(data=2, ulysses=2)):
        groups = create_groups(mesh, dist.get_rank())
        prepare_zero(nn.Linear(1, 1), {"zero_hpz_partition_size": 2}, groups)
        found.append(dist.get_process_group_ranks(deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP))
        restore_globals()
        assert deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is None
    return found


def test_a_secondary_partition_is_over_ranks_that_hold_the_same_weights():
    found = run_on_ranks(4, secondary_groups, deepspeed=True)
    assert [data for data, _, _ in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [data for _, data, _ in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [data for _, _, data in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_weights_whose_share_is_no_multiple_of_eight_are_not_quantized():
    from megatron.engine.zero import prepare_zero

    groups = ParallelGroups.alone()
    prepare_zero(nn.Linear(8, 8), {"zero_quantized_weights": True}, groups)
    with pytest.raises(ConfigError, match=r"1 ranks has 12 of weight \(4, 3\)"):
        prepare_zero(nn.Linear(3, 4), {"zero_quantized_weights": True}, groups)


WIDTH, LAYERS = 512, 64  # 1 MiB each in fp32


def resident_memory(field):
    """This process's memory, or the most it had since `reset_peak`, in MiB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def divide_a_model(num_layers):
    """How far memory grew at most, and in the end."""
    from megatron.engine.settings import build_settings
    from megatron.engine.zero import divide_weights, restore_globals

    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))
    settings = build_settings(toy.run_config(stage=3), data_parallel_size=dist.get_world_size(), device_type="cpu")
    # Transposed: as strided as a tensor rank's columns are, which NCCL does not take.
    weights = ((f"{layer}.weight", torch.full((WIDTH, WIDTH), float(layer)).t()) for layer in range(num_layers))
    reset_peak()
    before, linear = resident_memory("VmRSS"), F.linear
    divide_weights(model, weights, settings, toy.make_groups())
    grown = resident_memory("VmHWM") - before, resident_memory("VmRSS") - before
    for layer, parameter in enumerate(model.parameters()):
        assert parameter.ds_shape == (WIDTH, WIDTH)
        assert torch.equal(parameter.ds_tensor, torch.full((WIDTH * WIDTH // 2,), float(layer)))
    assert F.linear is not linear
    restore_globals()
    assert F.linear is linear
    return grown


def divide_two_models():
    ctypes.CDLL("libc.so.6").mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: a weight's memory is returned once it is free
    divide_a_model(2)  # modules that are imported and buffers that are made once
    return divide_a_model(LAYERS)


def test_zero_3_starts_with_no_more_in_memory_than_its_share_and_a_weight():
    share = LAYERS / 2
    for peak, kept in run_on_ranks(2, divide_two_models, deepspeed=True):
        assert kept == pytest.approx(share, abs=3)
        assert peak < share + 6
