"""Ranks that a program starts itself: answers in order, sentences of users' errors, and what a dead rank printed."""

import os

import pytest
import torch
import torch.distributed as dist

from megatron.config.errors import ConfigError, UserError
from megatron.engine.local_ranks import RankFailedError, run_local_ranks


def sum_over_ranks(environment, offset):
    from datetime import timedelta

    from megatron.engine.launch import start

    start(environment, timedelta(seconds=60))
    number = torch.tensor(environment.rank + offset)
    dist.all_reduce(number)
    return environment.rank, int(number)


def refuse(environment):
    raise ConfigError(["--flag 1: the first sentence.", "the second."])


def crash(environment):
    if environment.rank == 1:
        raise ZeroDivisionError("a rank divided by zero")


def die(environment):
    print("the last words", flush=True)
    os._exit(3)


def test_ranks_of_this_host_form_a_group_and_answer_in_order():
    assert run_local_ranks(2, sum_over_ranks, 10, timeout=120) == [(0, 21), (1, 21)]


def test_a_user_s_error_is_raised_with_all_its_sentences():
    with pytest.raises(UserError) as raised:
        run_local_ranks(2, refuse, timeout=60)
    assert str(raised.value) == "--flag 1: the first sentence.\nthe second."


def test_another_error_names_the_rank_and_shows_its_traceback():
    with pytest.raises(RankFailedError, match=r"rank 1: Traceback[\s\S]*a rank divided by zero"):
        run_local_ranks(2, crash, timeout=60)


def test_a_rank_that_dies_leaves_its_last_words():
    with pytest.raises(RankFailedError, match=r"rank 0 died or ran out of time[\s\S]*the last words"):
        run_local_ranks(1, die, timeout=60)
