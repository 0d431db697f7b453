"""Collectives over hosts: which link counts, and how often a latency does."""

import math

import pytest

from megatron.training.cluster import Cluster, Link

HOSTS = Cluster(flops=1.0, ranks_per_host=8, local=Link(0.001, 100.0), network=Link(0.01, 10.0))


def test_a_group_knows_its_hosts():
    found = [HOSTS.place(ranks) for ranks in (range(8), range(4, 12), range(0, 64, 8))]
    assert [(group.size, group.hosts, group.neighbours) for group in found] == [(8, 1, 8), (8, 2, 4), (8, 8, 1)]
    assert [group.link for group in found] == [HOSTS.local, HOSTS.network, HOSTS.network]


def test_a_rank_receives_all_but_its_own_share():
    assert HOSTS.place(range(2)).gather(800.0) == pytest.approx(0.001 + 800 / 2 / 100)
    assert HOSTS.place(range(8)).gather(800.0) == pytest.approx(0.001 + 800 * 7 / 8 / 100)
    assert HOSTS.place(range(8)).all_reduce(800.0) == pytest.approx(0.001 + 2 * 800 * 7 / 8 / 100)


def test_a_host_receives_through_the_ports_of_all_its_ranks_in_the_group():
    half = 800 / 2
    all_ports, one_port = HOSTS.place(range(16)), HOSTS.place((0, 8))
    # Eight ports of 10 carry less than the link of 100 inside, which passes on fifteen of sixteen shares.
    assert all_ports.gather(800.0) == pytest.approx(0.001 + 0.01 + max(half / 80, 800 * 15 / 16 / 100))
    assert one_port.gather(800.0) == pytest.approx(0.001 + 0.01 + half / 10)


def test_rings_wait_for_each_host_and_trees_for_each_doubling():
    everywhere = HOSTS.place(range(0, 8 * 64, 8))
    assert everywhere.gather(0.0) == pytest.approx(0.001 + 63 * 0.01)
    assert everywhere.all_reduce(0.0) == pytest.approx(0.001 + 2 * 6 * 0.01)


def test_an_exchange_sends_each_part_on_its_own_way():
    assert HOSTS.place(range(4)).exchange(400.0) == pytest.approx(0.001 + 400 * 3 / 4 / 100)
    assert HOSTS.place(range(16)).exchange(1600.0) == pytest.approx(0.001 + max(1600 * 7 / 16 / 100, 1600 / 2 / 10))


def test_a_rank_alone_tells_nobody_anything():
    alone = HOSTS.place([5])
    assert (alone.gather(1e9), alone.all_reduce(1e9), alone.exchange(1e9)) == (0.0, 0.0, 0.0)
    assert math.isclose(HOSTS.local.seconds(50.0), 0.501)
