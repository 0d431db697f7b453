"""The ranks as DeepSpeed sees them are the ranks of the mesh."""

import pytest
import torch
import torch.distributed as dist

from megatron.engine.mpu import DeepSpeedGroups
from megatron.parallel.groups import create_groups
from megatron.parallel.mesh import Mesh
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("mesh", [Mesh(pipeline=2, data=2, tensor=2), Mesh(data=3, tensor=2), Mesh(pipeline=4, data=2)])
def test_order_of_ranks_is_that_of_deepspeeds_own_grid(mesh):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    grid = PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.data)
    for axis, name in (("pipeline", "pipe"), ("data", "data"), ("tensor", "model")):
        theirs = sorted(tuple(ranks) for ranks in grid.get_axis_comm_lists(name) if len(ranks) > 1)
        assert theirs == [line for line in mesh.lines(axis) if len(line) > 1]


def test_nothing_turns_on_deepspeeds_own_sequence_parallelism():
    names = set(dir(DeepSpeedGroups))
    assert "initialize_sequence_parallel" not in names
    assert not [name for name in names if name.startswith("get_sequence")]


def answers(mesh):
    mpu = DeepSpeedGroups(create_groups(mesh, dist.get_rank()))
    found = {}
    for axis in ("data", "model", "tensor_model"):
        total = torch.tensor(dist.get_rank())
        handle = getattr(mpu, f"get_{axis}_parallel_group")()
        dist.all_reduce(total, group=handle)
        size, rank = (getattr(mpu, f"get_{axis}_parallel_{what}")() for what in ("world_size", "rank"))
        assert (size, rank) == (dist.get_world_size(handle), dist.get_rank(handle))
        found[axis] = total.item()
    assert sum(mpu.get_data_parallel_group_ranks()) == found["data"]
    assert (mpu.get_pipeline_model_parallel_world_size(), mpu.get_pipeline_model_parallel_rank()) == (1, 0)
    return tuple(found.values())


def answers_of_each(meshes):
    return [answers(mesh) for mesh in meshes]


def test_data_and_ulysses_ranks_are_one_axis_and_a_group_of_one_is_no_group_of_all():
    meshes = [Mesh(ulysses=2, tensor=2), Mesh(data=2, ulysses=2), Mesh(tensor=4)]
    tensor_pairs = [(0 + 2, 0 + 1, 0 + 1), (1 + 3, 0 + 1, 0 + 1), (0 + 2, 2 + 3, 2 + 3), (1 + 3, 2 + 3, 2 + 3)]
    for rank, found in enumerate(run_on_ranks(4, answers_of_each, meshes, deepspeed=True)):
        assert found == [tensor_pairs[rank], (6, rank, rank), (rank, 6, 6)]
