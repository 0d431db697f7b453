import io
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.parallel.groups import Group, ParallelGroups
from megatron.parallel.mesh import AXES, Mesh
from megatron.parallel.random import RandomStreams, rank_stream, seed_everything
from tests.parallel.logical import tensor_group
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _leave_no_trace():
    streams = RandomStreams(CPU)
    before = streams.state_dict()
    yield
    streams.load_state_dict(before)


def groups_of(mesh: Mesh, rank: int) -> ParallelGroups:
    """Groups as `create_groups` gives them, without their handles."""

    def group(ranks):
        return Group(ranks=ranks, rank=ranks.index(rank), handle=None)

    along = {axis: group(mesh.ranks_of(axis, rank)) for axis in AXES}
    (replicas,) = (ranks for ranks in mesh.lines("data", "ulysses") if rank in ranks)
    return ParallelGroups(world=group(tuple(range(mesh.world_size))), replicas=group(replicas), **along)


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def first_draws(seed: int, mesh: Mesh) -> list[tuple[float, float, float]]:
    each = []
    for rank in range(mesh.world_size):
        seed_everything(seed, groups_of(mesh, rank), CPU)
        each.append(draws())
    return each


def dropout_masks():
    group = tensor_group()
    seed_everything(1, ParallelGroups.alone(), CPU)
    ones = torch.ones(64)
    before = F.dropout(ones)
    with rank_stream(group, CPU):
        first = F.dropout(ones)
    with rank_stream(group, CPU):
        second = F.dropout(ones)
    after = F.dropout(ones)
    return [mask.tolist() for mask in (before, first, second, after)]


def test_tensor_ranks_share_their_streams_and_all_other_ranks_differ():
    mesh = Mesh(pipeline=2, data=2, ulysses=2, tensor=2)
    each = first_draws(1, mesh)
    for library in zip(*each, strict=True):
        assert library[0::2] == library[1::2]
        assert len(set(library)) == 8


def test_streams_depend_on_the_seed_and_on_nothing_else():
    assert first_draws(1, Mesh(data=4)) == first_draws(1, Mesh(data=4))
    assert not set(first_draws(1, Mesh(data=4))) & set(first_draws(2, Mesh(data=4)))


def test_inside_a_rank_stream_tensor_ranks_differ_and_outside_they_agree():
    (before, first, second, after), (other_before, other_first, other_second, other_after) = run_on_ranks(
        2, dropout_masks
    )
    assert before == other_before
    assert after == other_after
    different = [first, second, other_first, other_second, before, after]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_a_rank_stream_of_a_group_of_one_does_nothing():
    before = torch.get_rng_state()
    with rank_stream(Group.alone(), CPU):
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_inside_a_rank_stream_leaves_the_shared_stream_in_place():
    group = Group(ranks=(0, 1), rank=1, handle=None)
    torch.manual_seed(0)
    with rank_stream(group, CPU):
        torch.rand(3)
    expected = torch.rand(())
    torch.manual_seed(0)
    with pytest.raises(RuntimeError), rank_stream(group, CPU):
        raise RuntimeError
    assert torch.equal(torch.rand(()), expected)


def test_streams_continue_where_they_were_saved():
    streams = seed_everything(1, ParallelGroups.alone(), CPU)
    np.random.standard_normal()  # leaves half of a pair of numbers behind
    random.gauss()
    file = io.BytesIO()
    torch.save(streams.state_dict(), file)
    expected = [draws(), np.random.standard_normal(), random.gauss()]
    draws()
    file.seek(0)
    streams.load_state_dict(torch.load(file, weights_only=True))
    assert [draws(), np.random.standard_normal(), random.gauss()] == expected


def test_the_state_of_a_run_on_the_cpu_does_not_fit_a_device():
    state = RandomStreams(CPU).state_dict()
    assert RandomStreams(CPU).fits(state)
    assert not RandomStreams(torch.device("cuda:0")).fits(state)
    assert not RandomStreams(CPU).fits(state | {"device": state["cpu"]})


def test_streams_that_start_in_the_middle_of_a_run_follow_from_seed_iteration_and_place():
    def started(seed, iteration, rank):
        RandomStreams(CPU).seed(seed, groups_of(Mesh(data=2), rank), iteration)
        return draws()

    places = [(seed, iteration, rank) for seed in (1, 2) for iteration in (0, 1, 5) for rank in (0, 1)]
    assert len({started(*place) for place in places}) == len(places)
    assert started(1, 5, 1) == started(1, 5, 1)


@pytest.mark.gpu
def test_streams_of_a_device_continue_where_they_were_saved():
    device = torch.device("cuda", torch.cuda.current_device())
    streams = seed_everything(1, ParallelGroups.alone(), device)
    state = streams.state_dict()
    expected = torch.rand(4, device=device)
    streams.load_state_dict(state)
    assert torch.equal(torch.rand(4, device=device), expected)


@pytest.mark.gpu
def test_a_rank_stream_switches_the_generator_of_its_device():
    device = torch.device("cuda", torch.cuda.current_device())
    masks = []
    for rank in range(2):
        seed_everything(1, ParallelGroups.alone(), device)
        with rank_stream(Group(ranks=(0, 1), rank=rank, handle=None), device):
            masks.append(torch.rand(4, device=device))
        masks.append(torch.rand(4, device=device))
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
