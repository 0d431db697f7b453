"""Run a function on several ranks of this host, each a process of its own: a launcher inside of a program.

The function is called with the process's `RankEnvironment`, from which `launch.start` joins the others. On CPUs the
processes are forked from one that has imported torch and DeepSpeed, so that the import is paid once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.config.errors import UserError
from megatron.engine.launch import device_type
from megatron.engine.launchers import RankEnvironment, free_port

PRELOADED = ["megatron.engine.quiet_deepspeed"]

GRACE_SECONDS = 3.0
"""How long the other ranks may still tell of their errors after the first: that is not always the cause."""

SHOWN_LINES = 25
"""Of what a rank printed, when it failed."""


class RankFailedError(RuntimeError):
    """A rank raised, died or ran out of time; the text names the rank and says what it told."""


def run_local_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
    """Call `function(environment, *args)` in `world_size` processes.

    Args:
        world_size: number of processes.
        function: of the top level of a module, so that the processes can import it.
        args: pickled, the same for every rank.
        timeout: seconds for everything; then the processes are killed.

    Returns:
        what each rank returned, in the order of ranks.

    Raises:
        UserError: a rank raised one; it is raised again here.
        RankFailedError: a rank failed in another way.
    """
    context: Any = multiprocessing.get_context("forkserver" if device_type() == "cpu" else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    call, port = pickle.dumps((function, args)), free_port()
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, contextlib.ExitStack() as stack:
        answers: list[Any] = []
        for rank in range(world_size):
            environment = RankEnvironment(
                rank=rank,
                local_rank=rank,
                world_size=world_size,
                master_address="127.0.0.1",
                master_port=port,
                launcher="this program",
            )
            ours, theirs = context.Pipe()
            process = context.Process(target=_be_a_rank, args=(environment, call, theirs, _log(folder, rank)))
            process.daemon = True
            process.start()
            stack.callback(_end, process)
            theirs.close()  # the rank holds the only copy now: its death reads as end of file
            answers.append(ours)
        return _collect(answers, deadline, folder)


def _collect(connections: Sequence[Any], deadline: float, folder: str) -> list[Any]:
    """Wait for every rank's answer, or for the first failure and what the others say within the grace period."""
    results: dict[int, Any] = {}
    failures: dict[int, BaseException | None] = {}
    waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        ready: list[Any] = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                succeeded, answer = pickle.loads(connection.recv_bytes())  # noqa: S301 - written by our own child
            except EOFError:
                succeeded, answer = False, None
            (results if succeeded else failures)[rank] = answer
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if not failures and not waiting:
        return [results[rank] for rank in range(len(connections))]
    for failure in failures.values():
        if isinstance(failure, UserError):
            raise failure
    failures = failures or dict.fromkeys(waiting.values())
    raise RankFailedError("\n".join(_tell(rank, failure, folder) for rank, failure in sorted(failures.items())))


def _tell(rank: int, failure: BaseException | None, folder: str) -> str:
    if failure is not None:
        return f"rank {rank}: {failure}"
    printed = Path(_log(folder, rank)).read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    return "\n".join([f"rank {rank} died or ran out of time; it printed last:", *printed])


def _log(folder: str, rank: int) -> str:
    return str(Path(folder) / f"rank{rank}.log")


def _end(process: Any) -> None:
    process.kill()
    process.join()


def _be_a_rank(environment: RankEnvironment, call: bytes, connection: Any, log: str) -> None:
    """Body of a rank's process; what it prints goes to the log."""
    with open(log, "w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    try:
        import torch

        if device_type() == "cpu":
            torch.set_num_threads(1)
        function, args = pickle.loads(call)  # noqa: S301 - written by our own parent
        answer = pickle.dumps((True, function(environment, *args)))
    except UserError as error:
        answer = pickle.dumps((False, UserError(str(error))))  # of its kind it could not be read back
    except BaseException:
        answer = pickle.dumps((False, RankFailedError(traceback.format_exc())))
    connection.send_bytes(answer)
    with contextlib.suppress(EOFError):
        connection.recv_bytes()  # until killed: slower ranks may still have to connect to this one
    os._exit(0)
