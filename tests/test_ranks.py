import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_on_ranks


def tells_rank_and_argument(argument):
    return dist.get_rank(), argument, torch.get_num_threads()


def returns_a_tensor():
    return torch.full((3,), dist.get_rank())


def fails_on_rank_one():
    if dist.get_rank() == 1:
        raise RuntimeError("the reason")
    dist.barrier()


def dies_on_rank_one():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def sleeps_on_rank_one():
    if dist.get_rank() == 1:
        time.sleep(60)


def starts_by_the_launchers_variables():
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method="env://")
    return dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size()


def starts_through_deepspeed():
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    total = torch.ones(1)
    deepspeed.comm.all_reduce(total)
    return total.item(), sorted(os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]))


def test_each_rank_gets_the_arguments_and_its_answer_comes_back_in_order():
    assert run_on_ranks(3, tells_rank_and_argument, "x") == [(0, "x", 1), (1, "x", 1), (2, "x", 1)]


def test_a_tensor_outlives_the_rank_that_made_it():
    assert [tensor.tolist() for tensor in run_on_ranks(2, returns_a_tensor)] == [[0, 0, 0], [1, 1, 1]]


def test_an_error_on_one_rank_comes_back_with_its_traceback():
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*in fails_on_rank_one.*RuntimeError: the reason"):
        run_on_ranks(2, fails_on_rank_one)


def test_the_death_of_a_rank_is_an_error():
    with pytest.raises(RankError, match="rank 1: died with exit code 3"):
        run_on_ranks(2, dies_on_rank_one)


def test_a_rank_that_hangs_is_killed_when_time_is_up():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[1\] did not finish in time"):
        run_on_ranks(2, sleeps_on_rank_one, timeout=3)
    assert time.monotonic() - start < 10


def test_a_function_may_start_the_process_group_itself():
    assert run_on_ranks(2, starts_by_the_launchers_variables, initialize=False) == [(0, 0, 2), (1, 1, 2)]


@pytest.mark.parametrize("initialize", [True, False])
def test_deepspeed_runs_without_building_an_extension(initialize):
    answers = run_on_ranks(2, starts_through_deepspeed, deepspeed=True, initialize=initialize)
    assert answers == [(2.0, [])] * 2
