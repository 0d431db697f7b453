"""Ranks that meet learn who is missing, who is there twice, and whose number of ranks differs."""

import socket
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from megatron.engine import rendezvous
from megatron.engine.hosts import LaunchError
from megatron.engine.launchers import RankEnvironment
from tests.ranks import run_on_ranks

TIMEOUT = timedelta(seconds=20)


def environment_of_this_rank(**changes):
    from megatron.engine.launch import read_environment

    return replace(read_environment(), **changes)


def outcome(environment, timeout=TIMEOUT):
    """Meet; returns what came of it. The store's server is kept until all have their answer, by the process's end."""
    store = rendezvous.open_store(environment, timeout)
    try:
        return rendezvous.meet(store, environment, timeout)
    except LaunchError as error:
        return str(error)


def meet_as_told():
    environment = environment_of_this_rank()
    store = rendezvous.open_store(environment, TIMEOUT)
    interface = rendezvous.meet(store, environment, TIMEOUT)
    store.add("read", 1)
    while environment.rank == 0 and store.add("read", 0) < environment.world_size:
        time.sleep(0.01)  # the store ends with this process
    return interface


def test_ranks_of_one_host_need_no_interface():
    assert run_on_ranks(2, meet_as_told, initialize=False) == [None, None]


def meet_with_another_size():
    environment = environment_of_this_rank()
    return outcome(replace(environment, world_size=3 if environment.rank == 0 else 2))


def test_ranks_that_disagree_on_their_number_all_say_so():
    first, second = run_on_ranks(2, meet_with_another_size, initialize=False)
    assert first == second
    assert "rank 0 on" in first
    assert "was told of 3 ranks, rank 1 on" in first
    assert "of 2: start every machine with the same NUM_NODES and NUM_GPUS" in first


def meet_as_the_same_rank():
    environment = environment_of_this_rank()
    return outcome(replace(environment, rank=min(environment.rank, 1), world_size=3))


def test_a_rank_that_is_there_twice_stops_all():
    answers = run_on_ranks(3, meet_as_the_same_rank, initialize=False)
    assert len(set(answers)) == 1
    assert "rank 1 is there twice" in answers[0]
    assert "NODE_RANK" in answers[0]


def wait_in_vain():
    return outcome(replace(environment_of_this_rank(), world_size=3), timedelta(seconds=0.3))


def test_ranks_that_do_not_come_are_named_with_the_address():
    (sentence,) = run_on_ranks(1, wait_in_vain, initialize=False)
    assert sentence.startswith("2 of 3 ranks (1, 2) did not come to 127.0.0.1:")
    assert "MASTER_ADDR" in sentence


def reach_nobody():
    from megatron.engine import launch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = RankEnvironment(
        rank=1, local_rank=1, world_size=2, master_address="127.0.0.1", master_port=port, launcher="x"
    )
    with pytest.raises(LaunchError) as caught:
        launch.start(environment, timedelta(seconds=1))
    return str(caught.value), port


def test_an_address_where_nobody_answers_is_one_sentence():
    ((sentence, port),) = run_on_ranks(1, reach_nobody, initialize=False, deepspeed=True)
    assert f"could not join the others at 127.0.0.1:{port} within 0:00:01" in sentence
    assert "\n" not in sentence


def test_a_master_address_without_address_is_told_at_once(caplog):
    environment = RankEnvironment(
        rank=1, local_rank=0, world_size=2, master_address="nowhere.invalid", master_port=29500, launcher="x"
    )
    with pytest.raises(RuntimeError):
        rendezvous.open_store(environment, timedelta(seconds=0.5))
    assert "rank 1: MASTER_ADDR=nowhere.invalid has no address on" in caplog.text


def test_the_interface_of_an_address():
    assert rendezvous.interface_of("127.0.0.1") == "lo"
    assert rendezvous.interface_of("192.0.2.1") is None
    assert rendezvous.address_towards("127.0.0.1") == "127.0.0.1"


def test_an_interface_that_is_not_there_is_named_beside_those_that_are():
    rendezvous.check_interfaces("lo")
    with pytest.raises(LaunchError, match=r"GLOO_SOCKET_IFNAME=eth99: .* no network interface eth99, only .*lo"):
        rendezvous.check_interfaces("eth99")
