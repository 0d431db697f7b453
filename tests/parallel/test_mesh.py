import pytest

from megatron.parallel.mesh import AXES, Coordinates, Mesh

MESH = Mesh(pipeline=2, data=3, ulysses=2, tensor=2)


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_far_apart():
    assert MESH.ranks_of("tensor", 5) == (4, 5)
    assert MESH.ranks_of("ulysses", 5) == (5, 7)
    assert MESH.ranks_of("data", 5) == (1, 5, 9)
    assert MESH.ranks_of("pipeline", 5) == (5, 17)


def test_coordinates_and_rank_are_inverse():
    assert MESH.world_size == 24
    assert [MESH.rank_at(MESH.coordinates(rank)) for rank in range(24)] == list(range(24))
    assert MESH.coordinates(23) == Coordinates(pipeline=1, data=2, ulysses=1, tensor=1)


@pytest.mark.parametrize("axis", AXES)
def test_lines_of_an_axis_hold_each_rank_once_and_are_the_ranks_lines(axis):
    lines = MESH.lines(axis)
    assert sorted(sum(lines, ())) == list(range(24))
    assert all(MESH.ranks_of(axis, rank) == line for line in lines for rank in line)


def test_data_and_ulysses_together_are_the_ranks_that_hold_the_same_weights():
    assert Mesh(data=2, ulysses=2, tensor=2).lines("data", "ulysses") == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_all_axes_together_are_the_world():
    assert MESH.lines(*AXES) == [tuple(range(24))]


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="data=0"):
        Mesh(data=0)


def test_a_rank_outside_the_mesh_is_refused():
    with pytest.raises(ValueError, match="rank 24"):
        MESH.coordinates(24)
