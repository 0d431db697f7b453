"""The table of ranks names each one's host, device and place in the mesh, and stays short."""

import pytest

from megatron.parallel.mesh import Mesh
from megatron.training.rank_table import Seat, describe_ranks


def seats(num_hosts, ranks_each):
    return [Seat(f"node{host}", f"cuda:{rank}") for host in range(num_hosts) for rank in range(ranks_each)]


def test_each_rank_of_a_small_run_has_a_row():
    assert describe_ranks(Mesh(pipeline=2, tensor=2), seats(2, 2)) == [
        " rank  host   device  pipeline  data  ulysses  tensor",
        " 0     node0  cuda:0  0         0     0        0",
        " 1     node0  cuda:1  0         0     0        1",
        " 2     node1  cuda:0  1         0     0        0",
        " 3     node1  cuda:1  1         0     0        1",
    ]


def test_many_ranks_are_told_host_by_host():
    table = describe_ranks(Mesh(pipeline=2, data=4, tensor=4), seats(4, 8))
    assert [line.split() for line in table[1:3]] == [
        ["0-7", "node0", "cuda:0", "..", "cuda:7", "0", "0-1", "0", "0-3"],
        ["8-15", "node1", "cuda:0", "..", "cuda:7", "0", "2-3", "0", "0-3"],
    ]
    assert len(table) == 5


def test_of_very_many_hosts_the_first_and_the_last_are_told():
    table = describe_ranks(Mesh(data=128, tensor=8), seats(128, 8))
    assert len(table) == 18
    assert table[-2].strip() == "... 112 more rows"
    assert table[-1].split()[:2] == ["1016-1023", "node127"]


def test_a_single_rank_has_no_table():
    assert describe_ranks(Mesh(), seats(1, 1)) == []


@pytest.mark.parametrize(
    ("mesh", "where", "warning"),
    [
        (Mesh(data=2, tensor=2), seats(2, 2), None),
        (Mesh(tensor=4), seats(2, 2), "1 of 1 tensor groups span hosts (ranks 0-3 are on node0, node1)"),
        (Mesh(data=2, tensor=2), seats(4, 1), "2 of 2 tensor groups span hosts (ranks 0-1 are on node0, node1)"),
        (Mesh(tensor=8), seats(8, 1), "node0, node1, node2, node3, ...)"),
    ],
)
def test_a_tensor_group_that_spans_hosts_is_warned_of(mesh, where, warning):
    warnings = [line for line in describe_ranks(mesh, where) if "warning" in line]
    assert len(warnings) == (warning is not None)
    assert all(warning in line for line in warnings)
