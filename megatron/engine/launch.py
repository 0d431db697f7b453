"""Which rank this process is, and its start and stop: the only place that reads environment variables."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron.engine.hosts import LaunchError
from megatron.engine.launchers import RankEnvironment, parse_environment
from megatron.engine.rendezvous import check_interfaces, meet, open_store

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

STALE_LOCK_SECONDS = 600


def read_environment(variables: Mapping[str, str] | None = None) -> RankEnvironment:
    """Find out which rank this process is from what its launcher left in the environment.

    Knows torchrun, the `deepspeed` launcher, SLURM's srun, Open MPI, MVAPICH and MPICH; without any of them the run is
    this one process, on a free port.

    Args:
        variables: the environment; the process's own by default.

    Raises:
        LaunchError: the variables are incomplete or contradict each other.
    """
    return parse_environment(os.environ if variables is None else variables)


def start(environment: RankEnvironment, timeout: timedelta) -> torch.device:
    """Join the process group and return this rank's device: `cuda:<local rank>` where there are GPUs, else the CPU.

    `DS_ACCELERATOR=cpu` keeps a run off the GPUs. Groups made later have torch's time-out unless they are given one.

    Args:
        environment: this process's rank.
        timeout: how long a rank waits for the others, here and in each collective of the world group.

    Raises:
        LaunchError: there is no GPU for this local rank, or the other ranks were not found in time.
    """
    device = _select_device(environment)
    _export(environment, device)
    _warn_of_stale_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    with quiet_stdout():
        import deepspeed
        from deepspeed.utils import logger

    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # warnings, apart from the program's own output
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory operator for a minute at each first start on a CPU, and a build that
        # was killed leaves a lock on which every later start waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        _join(environment, backend, device, timeout)
        with quiet_stdout():
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    except LaunchError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LaunchError(
            f"rank {environment.rank} of {environment.world_size} (started by: {environment.launcher}) could not join "
            f"the others at {environment.master_address}:{environment.master_port} within {timeout}: {reason}; all "
            "ranks must be running, reach that address, and the port must be free (set MASTER_ADDR and MASTER_PORT)"
        ) from error
    return device


def _join(environment: RankEnvironment, backend: str, device: torch.device, timeout: timedelta) -> None:
    """Form the process group; gloo, which also carries the agreements beside NCCL, is told its network interface."""
    import torch.distributed as dist

    if dist.is_initialized():  # a second run of the process stays in its process group
        return
    if named := os.environ.get("GLOO_SOCKET_IFNAME"):
        check_interfaces(named)
    store = open_store(environment, timeout)
    interface = meet(store, environment, timeout)
    if interface is not None:
        # gloo would take the address that this host's name stands for, which is often one of its loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(
        backend,
        store=store,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
        # NCCL then connects at once, and groups made later share its resources; a rank alone has nobody to reach.
        device_id=device if backend == "nccl" and environment.world_size > 1 else None,
    )


def stop() -> None:
    """Leave the process group; nothing happens when it was never joined."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        return
    from deepspeed.comm import comm

    torch.distributed.destroy_process_group()
    comm.cdb = None  # DeepSpeed's handle of the group, which outlives it and would stop a second start


def leave(code: int) -> NoReturn:
    """End a rank's process with this exit code, as `sys.exit` does, but for what follows its exit handlers.

    That would not be safe. A thread of gloo that lets go of a collective's tensor waits for Python's lock; where the
    interpreter is ending, Python ends that thread, inside a C++ destructor, which aborts the process: a run that is
    done and saved would count as failed, now and then.
    """
    atexit.register(_end, code)
    sys.exit(code)


def _end(code: int) -> NoReturn:
    """Do what was registered for the exit, then nothing more."""
    atexit.unregister(_end)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone, or it is closed
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Turn what is printed inside into debug records of the log: DeepSpeed prints progress that no level silences."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stdout(captured):
            yield
    finally:
        for line in captured.getvalue().splitlines():
            log.debug("deepspeed: %s", line)


def device_type() -> str:
    """Say where ranks of this host compute: "cuda" where there are GPUs, unless `DS_ACCELERATOR=cpu` keeps them off.

    Raises:
        LaunchError: the variable asks for what is not there.
    """
    import torch

    wish = os.environ.get("DS_ACCELERATOR")
    if wish not in (None, "cpu", "cuda"):
        raise LaunchError(f"DS_ACCELERATOR={wish}: this framework runs on 'cuda' or 'cpu'; set one of them or none")
    if wish != "cpu" and torch.cuda.is_available():
        return "cuda"
    if wish == "cuda":
        raise LaunchError("DS_ACCELERATOR=cuda but torch sees no GPU here: unset it to run on the CPU")
    return "cpu"


def _select_device(environment: RankEnvironment) -> torch.device:
    import torch

    if device_type() == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if environment.local_rank >= count:
        raise LaunchError(
            f"local rank {environment.local_rank} has no GPU: {count} visible on {socket.gethostname()}; start at most "
            f"{count} processes on this host (deepspeed --num_gpus {count}), or make all GPUs visible to each process "
            "(srun --gpu-bind=none)"
        )
    device = torch.device("cuda", environment.local_rank)
    torch.cuda.set_device(device)
    return device


def _export(environment: RankEnvironment, device: torch.device) -> None:
    """Give DeepSpeed and torch the variables that they read, whoever was the launcher."""
    import torch

    os.environ.update(
        RANK=str(environment.rank),
        LOCAL_RANK=str(environment.local_rank),
        WORLD_SIZE=str(environment.world_size),
        MASTER_ADDR=environment.master_address,
        MASTER_PORT=str(environment.master_port),
        DS_ACCELERATOR=device.type,
    )
    # Operators compiled on first use, apart for each installation: two that share a folder rebuild each other's.
    installation = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "megatron" / "torch_extensions" / installation))
    if device.type == "cuda" and re.search(r"\d[af]\b", os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
        # Images of NVIDIA's name targets such as 10.0a, at which DeepSpeed's build of an operator would fail.
        major, minor = torch.cuda.get_device_capability(device)
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"


def _warn_of_stale_locks(extensions: Path) -> None:
    """Name the locks of builds that were killed: torch waits for them for ever and says nothing."""
    for lock in extensions.glob("**/lock"):
        with contextlib.suppress(OSError):
            age = time.time() - lock.stat().st_mtime
            if age > STALE_LOCK_SECONDS:
                log.warning(
                    "%s is a lock of an operator's build, %d minutes old: if nothing is being compiled, remove it, or "
                    "the build that needs it waits for ever",
                    lock,
                    age // 60,
                )
