"""Worker processes that do one task after the other, and tell in a sentence when one cannot."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron.config.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerError(UserError):
    """A worker died, or failed in a way that nobody foresaw."""


class WorkerPool(Generic[Task, Result]):
    """A number of processes, each of which gets a new task when it has finished one.

    The processes are spawned, so that they share no lock or thread with this one. When this process dies by whatever
    signal, a worker finds its pipe closed after its task, and ends.

    Args:
        size: number of processes at most: they are started as tasks come.
        start: called once in each; returns the function that does a task. Both it and the tasks are pickled.
    """

    def __init__(self, size: int, start: Callable[[], Callable[[Task], Result]]) -> None:
        self._size = size
        self._start = start
        self._workers: dict[Connection, BaseProcess] = {}

    def _add_worker(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, self._start), daemon=True)
        process.start()
        there.close()
        self._workers[here] = process
        return here

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Do the tasks; results come as they are finished. One task beyond those in work is taken from `tasks`.

        Raises:
            UserError: as a worker raised it.
            WorkerError: a worker failed otherwise, or died.
        """
        waiting = iter(tasks)
        idle = list(self._workers)
        busy: list[Connection] = []
        ready = next(waiting, None)
        while ready is not None or busy:
            while ready is not None and (idle or len(self._workers) < self._size):
                connection = idle.pop() if idle else self._add_worker()
                _send(connection, ready)
                busy.append(connection)
                ready = next(waiting, None)
            for connection in [connection for connection in wait(busy) if isinstance(connection, Connection)]:
                busy.remove(connection)
                idle.append(connection)
                yield self._receive(connection)

    def _receive(self, connection: Connection) -> Result:
        try:
            state, content = connection.recv()
        except (EOFError, ConnectionResetError):
            process = self._workers[connection]
            process.join()
            raise WorkerError(_how_it_died(process.exitcode)) from None
        if state == "done":
            result: Result = content
            return result
        raise UserError(content) if state == "refused" else WorkerError(content)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for connection, process in self._workers.items():
            connection.close()
            process.terminate()
        for process in self._workers.values():
            process.join()
        self._workers = {}

    def __enter__(self) -> WorkerPool[Task, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _send(connection: Connection, task: Any) -> None:
    try:
        connection.send(task)
    except BrokenPipeError:
        return  # its death is told when its result is asked for


def _how_it_died(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        hint = " (out of memory?)" if -exit_code == signal.SIGKILL else ""
        return f"A worker was ended by {signal.Signals(-exit_code).name}{hint}: the same command goes on from here."
    return f"A worker ended with exit code {exit_code}: what it said is above; the same command goes on from here."


def _work(connection: Connection, start: Callable[[], Callable[[Any], Any]]) -> None:
    """Do tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    try:
        function = start()
        for task in _tasks_from(connection):
            connection.send(("done", function(task)))
    except (BrokenPipeError, ConnectionResetError):
        return
    except (UserError, OSError) as error:  # a full disk is told as the system tells it
        connection.send(("refused", str(error)))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        connection.send(("failed", f"A worker failed ({type(error).__name__}: {error}): its trace is above."))


def _tasks_from(connection: Connection) -> Iterator[Any]:
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        yield task
