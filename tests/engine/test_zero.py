"""ZeRO++: groups of ranks that hold the same weights, and weights that can be quantized."""

import pytest
import torch.distributed as dist
from torch import nn

from megatron.config.errors import ConfigError
from megatron.parallel.groups import ParallelGroups, create_groups
from megatron.parallel.mesh import Mesh
from tests.ranks import run_on_ranks


def secondary_groups():
    from deepspeed.utils import groups as deepspeed_groups

    from megatron.engine.zero import forget_groups, prepare_zero

    found = []
    for mesh in (Mesh(data=4), Mesh(data=2, tensor=2), Mesh(data=2, ulysses=2)):
        groups = create_groups(mesh, dist.get_rank())
        prepare_zero(nn.Linear(1, 1), {"zero_hpz_partition_size": 2}, groups)
        found.append(dist.get_process_group_ranks(deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP))
        forget_groups()
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
