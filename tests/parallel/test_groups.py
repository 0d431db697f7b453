from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from megatron.parallel.groups import Group, ParallelGroups, create_groups
from megatron.parallel.mesh import Mesh
from tests.ranks import run_on_ranks


def ranks_and_sums_of_each_group(mesh):
    groups = create_groups(mesh, dist.get_rank())
    answer = {}
    for field in fields(groups):
        group = getattr(groups, field.name)
        total = torch.tensor(dist.get_rank())
        if group.size > 1:
            dist.all_reduce(total, group=group.handle)
        assert group.ranks[group.rank] == dist.get_rank()
        answer[field.name] = (group.ranks, total.item())
    return answer


def test_groups_are_the_lines_of_the_mesh_and_communicate_within_them():
    answers = run_on_ranks(4, ranks_and_sums_of_each_group, Mesh(data=2, tensor=2))
    for rank, answer in enumerate(answers):
        tensor, data = {0: ((0, 1), (0, 2)), 1: ((0, 1), (1, 3)), 2: ((2, 3), (0, 2)), 3: ((2, 3), (1, 3))}[rank]
        assert answer == {
            "world": ((0, 1, 2, 3), 6),
            "replicas": (data, sum(data)),
            "pipeline": ((rank,), rank),
            "data": (data, sum(data)),
            "ulysses": ((rank,), rank),
            "tensor": (tensor, sum(tensor)),
        }


def test_replicas_are_the_plane_of_data_and_ulysses():
    answers = run_on_ranks(4, ranks_and_sums_of_each_group, Mesh(data=2, ulysses=2))
    assert [answer["replicas"] for answer in answers] == [((0, 1, 2, 3), 6)] * 4


def test_a_mesh_of_one_rank_needs_no_process_group():
    assert create_groups(Mesh(), 0) == ParallelGroups.alone()
    assert Group.alone() == Group(ranks=(0,), rank=0, handle=None)


def test_a_mesh_larger_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"has 2 ranks but 1 are running"):
        create_groups(Mesh(tensor=2), 0)
