import os
import signal
import sys

import pytest

from megatron.config.errors import UserError
from megatron.data.preprocess.workers import WorkerError, WorkerPool


def start_doubling():
    return double


def double(task):
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "leave":
        sys.exit(3)
    if task == "refuse":
        raise UserError("a sentence for the user")
    if task == "disk":
        raise OSError(28, "No space left on device")
    if task == "fail":
        raise RuntimeError("not foreseen")
    return (os.getpid(), 2 * task)


def refuse_to_start():
    raise UserError("cannot start")


def test_all_tasks_are_done_by_no_more_processes_than_asked_for():
    with WorkerPool(2, start_doubling) as pool:
        results = list(pool.map(range(20)))
    assert sorted(result for _, result in results) == list(range(0, 40, 2))
    assert len({process for process, _ in results}) <= 2


def test_no_more_processes_are_started_than_there_are_tasks():
    with WorkerPool(50, start_doubling) as pool:
        assert [result for _, result in pool.map([1])] == [2]
        assert len(pool._workers) == 1


def test_tasks_are_taken_one_ahead_and_not_all_at_once():
    taken = []

    def tasks():
        for i in range(100):
            taken.append(i)
            yield i

    with WorkerPool(1, start_doubling) as pool:
        results = pool.map(tasks())
        next(results)
        assert len(taken) <= 3


@pytest.mark.parametrize(
    ("task", "kind", "sentence"),
    [
        ("die", WorkerError, r"ended by SIGKILL \(out of memory\?\)"),
        ("leave", WorkerError, "ended with exit code 3"),
        ("refuse", UserError, "^a sentence for the user$"),
        ("disk", UserError, r"^\[Errno 28\] No space left on device"),
        ("fail", WorkerError, r"A worker failed \(RuntimeError: not foreseen\)"),
    ],
)
def test_a_worker_that_cannot_go_on_is_an_error_of_the_caller(task, kind, sentence):
    with WorkerPool(1, start_doubling) as pool, pytest.raises(kind, match=sentence):
        list(pool.map([1, task, 2]))


def test_a_worker_that_cannot_start_is_an_error_of_the_caller():
    with WorkerPool(1, refuse_to_start) as pool, pytest.raises(UserError, match=r"^cannot start$"):
        list(pool.map([1]))
