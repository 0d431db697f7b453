"""Run a function on several ranks: real processes with a real process group, started in a fraction of a second.

    def sums_its_rank(offset):
        x = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(x)
        return x.item()

    def test_sum():
        assert run_on_ranks(2, sums_its_rank, 10) == [21.0, 21.0]

Processes are forked from a server that has torch loaded already, so the import is paid once for a whole test run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

PRELOADED = [
    "numpy",
    "pytest",
    "torch",
    "torch.distributed",
    "torch.utils.checkpoint",
    "megatron.parallel.cross_entropy",
    "megatron.parallel.embedding",
    "megatron.parallel.linear",
    "megatron.parallel.random",
    "megatron.parallel.recompute",
]

GRACE_SECONDS = 2.0
"""How long the other ranks may still tell of their errors after the first one: the first is not always the cause."""


class RankError(AssertionError):
    """One or more ranks raised, died or ran out of time; the message holds the traceback of each."""


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """What a rank process is told at its start."""

    rank: int
    world_size: int
    backend: str
    initialize: bool
    deepspeed: bool
    timeout: float
    folder: Path
    port: int
    call: bytes


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    initialize: bool = True,
    deepspeed: bool = False,
    timeout: float = 120.0,
) -> list[Any]:
    """Call `function(*args)` in `world_size` processes that form one process group.

    Args:
        world_size: number of processes.
        function: defined at the top level of a module, so that the processes can import it.
        args: arguments, the same for every rank; pickled. The rank is `torch.distributed.get_rank()`.
        backend: "gloo", or "nccl" where each rank has a CUDA device of its own.
        initialize: whether the process group exists when the function is called; without it the function makes its
            own from the launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), which are
            always set.
        deepspeed: the function uses DeepSpeed: keeps it from building its C++ extension for shared memory.
        timeout: seconds for everything; then the ranks are killed.

    Returns:
        what each rank returned, in order of rank.

    Raises:
        RankError: a rank raised, died or ran out of time.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        first = RankSetup(
            rank=0,
            world_size=world_size,
            backend=backend,
            initialize=initialize,
            deepspeed=deepspeed,
            timeout=timeout,
            folder=Path(folder),
            port=_free_port(),
            call=pickle.dumps((function, args)),
        )
        with _started(first) as (connections, processes):
            return _collect(connections, processes, deadline)


@contextlib.contextmanager
def _started(first: RankSetup) -> Iterator[tuple[list[Any], list[Any]]]:
    """Start all ranks, of which `first` is told here, and end them; gives their connections and processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    connections: list[Any] = []
    processes: list[Any] = []
    try:
        for rank in range(first.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_be_a_rank, args=(replace(first, rank=rank), theirs), daemon=True)
            process.start()
            theirs.close()  # the rank holds the only copy now: its death reads as end of file
            connections.append(ours)
            processes.append(process)
        yield connections, processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _collect(connections: Sequence[Any], processes: Sequence[Any], deadline: float) -> list[Any]:
    """Wait for every rank's answer, or for the first failure and what the others say within the grace period."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[call-overload]
            try:
                succeeded, answer = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(1)
                succeeded, answer = False, f"died with exit code {processes[rank].exitcode}"
            if succeeded:
                results[rank] = pickle.loads(answer)  # noqa: S301 - written by our own child
            else:
                failures[rank] = answer
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise RankError("\n".join(f"--- rank {rank}: {text}" for rank, text in failures.items()))
    if waiting:
        raise RankError(f"ranks {sorted(waiting.values())} did not finish in time")
    return [results[rank] for rank in range(len(connections))]


def _be_a_rank(setup: RankSetup, connection: Any) -> None:
    """Body of a rank process; it ends by `os._exit` or killed, since no exit handler of a library is under test."""
    try:
        _prepare(setup)
        function, args = pickle.loads(setup.call)  # noqa: S301 - written by our own parent
        # Pickled here, by value: torch would hand tensors over by file descriptors that die with this process.
        answer = pickle.dumps(function(*args))
    except BaseException:
        connection.send((False, traceback.format_exc()))
        os._exit(1)  # at once, so that ranks that wait for this one fail as well
    connection.send((True, answer))
    with contextlib.suppress(EOFError):
        connection.recv()  # until killed: slower ranks may still have to connect to this one
    os._exit(0)


def _prepare(setup: RankSetup) -> None:
    """Environment, threads and process group of a rank."""
    # A folder of its own: the lock file of a killed build would stop every later run that shares the folder.
    extensions = setup.folder / f"extensions-{setup.rank}"
    extensions.mkdir()
    os.environ.update(
        RANK=str(setup.rank),
        LOCAL_RANK=str(setup.rank),
        WORLD_SIZE=str(setup.world_size),
        LOCAL_WORLD_SIZE=str(setup.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(setup.port),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        TORCH_EXTENSIONS_DIR=str(extensions),
    )
    if setup.backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if setup.backend == "nccl":
        torch.cuda.set_device(setup.rank)
    if setup.deepspeed:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if setup.initialize:
        dist.init_process_group(
            setup.backend,
            init_method=f"file://{setup.folder / 'store'}",
            rank=setup.rank,
            world_size=setup.world_size,
            timeout=timedelta(seconds=setup.timeout),
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
