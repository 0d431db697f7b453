"""Which rank this process is, and its start and stop: the only place that reads environment variables."""

from __future__ import annotations

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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DEFAULT_PORT = 29500
STALE_LOCK_SECONDS = 600


class LaunchError(UserError, RuntimeError):
    """The processes of this run cannot find each other or their device."""


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """One process among those of the run.

    Attributes:
        rank: 0 .. world_size - 1.
        local_rank: 0 .. number of processes on this host - 1; also the number of its GPU.
        master_address: host name or address of rank 0.
        master_port: TCP port on which rank 0 waits for the others.
        launcher: who started the process, for messages.
    """

    rank: int
    local_rank: int
    world_size: int
    master_address: str
    master_port: int
    launcher: str


@dataclass(frozen=True)
class _Launcher:
    """The environment variables by which one launcher tells a process its rank; for each the first that is set."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]


# The order decides: torchrun may itself run under srun, and srun may set the variables of MPI.
_LAUNCHERS = (
    _Launcher("torchrun or deepspeed", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",)),
    _Launcher("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",)),
    _Launcher("Open MPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    _Launcher("MPICH", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK")),
)


def read_environment(variables: Mapping[str, str] | None = None) -> RankEnvironment:
    """Find out which rank this process is from what its launcher left in the environment.

    Knows torchrun, the `deepspeed` launcher, SLURM's srun, Open MPI and MPICH; without any of them the run is this one
    process, on a free port.

    Args:
        variables: the environment; the process's own by default.

    Raises:
        LaunchError: the variables are incomplete or contradict each other.
    """
    variables = os.environ if variables is None else variables
    _refuse_half_set(variables)
    for launcher in _LAUNCHERS:
        if any(name in variables for name in launcher.rank):
            return _read(launcher, variables)
    port = _integer(variables, ("MASTER_PORT",)) if "MASTER_PORT" in variables else free_port()
    return RankEnvironment(
        rank=0, local_rank=0, world_size=1, master_address="127.0.0.1", master_port=port, launcher="none"
    )


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
    where = f"{environment.master_address}:{environment.master_port}"
    try:
        with quiet_stdout():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, timeout=timeout
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"rank {environment.rank} of {environment.world_size} (started by: {environment.launcher}) could not join "
            f"the others at {where} within {timeout}: {error}; all ranks must be running, reach that address, and the "
            "port must be free (set MASTER_ADDR and MASTER_PORT)"
        ) from error
    return device


def stop() -> None:
    """Leave the process group; nothing happens when it was never joined."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        return
    from deepspeed.comm import comm

    torch.distributed.destroy_process_group()
    comm.cdb = None  # DeepSpeed's handle of the group, which outlives it and would stop a second start


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


def _refuse_half_set(variables: Mapping[str, str]) -> None:
    present = [name for name in ("RANK", "WORLD_SIZE") if name in variables]
    if len(present) == 1:
        missing = "RANK" if present == ["WORLD_SIZE"] else "WORLD_SIZE"
        raise LaunchError(
            f"{present[0]}={variables[present[0]]} is set but {missing} is not: start with `deepspeed` or `torchrun`, "
            f"which set both, or unset {present[0]} for a run of one process"
        )
    alone = "SLURM_JOB_ID" in variables and not {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"} & set(variables)
    if not present and alone and "SLURM_PROCID" in variables and _integer(variables, ("SLURM_NTASKS",), 1) > 1:
        raise LaunchError(
            f"SLURM_NTASKS={variables['SLURM_NTASKS']} but the batch script itself runs once: start the program with "
            "srun, torchrun or deepspeed"
        )


def _read(launcher: _Launcher, variables: Mapping[str, str]) -> RankEnvironment:
    rank = _integer(variables, launcher.rank)
    world_size = _integer(variables, launcher.world_size)
    local_rank = _integer(variables, launcher.local_rank, 0 if world_size == 1 else None)
    if not (0 <= rank < world_size and local_rank >= 0):
        raise LaunchError(
            f"{launcher.rank[0]}={rank}, {launcher.world_size[0]}={world_size}, {launcher.local_rank[0]}={local_rank}: "
            "the rank must be in 0 .. world size - 1 and the local rank not negative; unset stale variables of an "
            "earlier run"
        )
    return RankEnvironment(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        master_address=_master_address(variables, world_size),
        master_port=_master_port(variables, world_size),
        launcher=launcher.name,
    )


def _master_address(variables: Mapping[str, str], world_size: int) -> str:
    if "MASTER_ADDR" in variables:
        return variables["MASTER_ADDR"]
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if name in variables:
            return first_host(variables[name])
    on_one_host = variables.get("OMPI_COMM_WORLD_LOCAL_SIZE", variables.get("MPI_LOCALNRANKS")) == str(world_size)
    if world_size == 1 or on_one_host:
        return "127.0.0.1"
    raise LaunchError(
        f"MASTER_ADDR is not set and the run has {world_size} processes: export MASTER_ADDR=<host of rank 0> to all of "
        "them (Open MPI: mpirun -x MASTER_ADDR=...)"
    )


def _master_port(variables: Mapping[str, str], world_size: int) -> int:
    if "MASTER_PORT" in variables:
        return _integer(variables, ("MASTER_PORT",))
    if world_size == 1:
        return free_port()
    if "SLURM_JOB_ID" in variables:  # the same on all ranks, and different for two jobs that share a host
        return 20_000 + _integer(variables, ("SLURM_JOB_ID",)) % 10_000
    return DEFAULT_PORT


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: `node[003-007,9],other` gives `node003`."""
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodelist)
    if first is None:
        raise LaunchError(f"SLURM's node list '{nodelist}' names no host: set MASTER_ADDR to the host of rank 0")
    return "".join(part or "" for part in first.groups())


def _integer(variables: Mapping[str, str], names: tuple[str, ...], default: int | None = None) -> int:
    for name in names:
        if name in variables:
            try:
                return int(variables[name])
            except ValueError:
                raise LaunchError(f"{name}='{variables[name]}' is not a whole number: unset or correct it") from None
    if default is None:
        raise LaunchError(f"{' or '.join(names)} is not set: start with `deepspeed`, `torchrun`, srun or mpirun")
    return default


def free_port() -> int:
    """Find a TCP port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
