"""Lists of hosts are read as SLURM and DeepSpeed write them, and a wrong line is named."""

import socket

import pytest

from megatron.engine.hosts import LaunchError, choose_hosts, expand_nodelist, number_of_this_host, read_hostfile


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("node[01-04,7]", ["node01", "node02", "node03", "node04", "node7"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[7,9-10]-ib,x", ["n7-ib", "n9-ib", "n10-ib", "x"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_a_node_list_is_expanded_in_its_order(nodelist, hosts):
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "n[1-", "n[a-b]", "a,,b", "n]1["])
def test_what_is_no_node_list_is_refused_with_the_way_out(nodelist):
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        expand_nodelist(nodelist)


def test_a_hostfile_gives_hosts_and_slots_in_its_order(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# all of them\nb slots=8\n\na  slots=4  # older\n")
    hosts = read_hostfile(file)
    assert list(hosts.items()) == [("b", 8), ("a", 4)]
    assert choose_hosts(hosts, file, None, 4) == (2, 4)
    assert choose_hosts(hosts, file, 1, None) == (1, 8)


def test_a_hostfile_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LaunchError, match="hosts does not exist"):
        read_hostfile(tmp_path / "hosts")


def test_this_machine_is_found_by_name_or_address():
    assert number_of_this_host(["x.invalid", socket.gethostname()]) == 1
    assert number_of_this_host(["192.0.2.1", "127.0.0.1"]) == 1
    assert number_of_this_host(["192.0.2.1", "x.invalid"]) is None
