"""What each launcher tells a process of its rank by environment variables: a function of a mapping, nothing else."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.engine.hosts import LaunchError, expand_nodelist

DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """One process among those of the run.

    Attributes:
        rank: 0 .. world_size - 1.
        local_rank: 0 .. number of processes on this host - 1; also the number of its GPU.
        master_address: host name or address of rank 0.
        master_port: TCP port on which rank 0 waits for the others.
        launcher: who started the process, for messages.
        agent_store: whether the launcher itself serves the store at that address, as torchrun does, and not rank 0.
        attempt: how often the launcher has started these ranks anew.
    """

    rank: int
    local_rank: int
    world_size: int
    master_address: str
    master_port: int
    launcher: str
    agent_store: bool = False
    attempt: int = 0


@dataclass(frozen=True)
class _Launcher:
    """The environment variables by which one launcher tells a process its rank; for each the first that is set."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]


# The order decides, since launchers start one another: torchrun may run under srun, and mpirun has its daemons started
# by srun, whose variables the ranks then see. One that tells no local rank comes last: srun sets some of MPICH's.
SRUN = _Launcher("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",))
_LAUNCHERS = (
    _Launcher("torchrun or deepspeed", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",)),
    _Launcher("Open MPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    _Launcher("MVAPICH", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",)),
    _Launcher("MPICH", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK")),
    SRUN,
)
_RANKS_ON_THIS_HOST = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")


def parse_environment(variables: Mapping[str, str]) -> RankEnvironment:
    """Find the launcher that left its variables, and read them; see `launch.read_environment`."""
    _refuse_half_set(variables)
    _refuse_batch_script(variables)
    found = [launcher for launcher in _LAUNCHERS if any(name in variables for name in launcher.rank)]
    complete = [launcher for launcher in found if any(name in variables for name in launcher.local_rank)]
    if found:
        return _read((complete or found)[0], variables)
    port = _integer(variables, ("MASTER_PORT",)) if "MASTER_PORT" in variables else free_port()
    return RankEnvironment(
        rank=0, local_rank=0, world_size=1, master_address="127.0.0.1", master_port=port, launcher="none"
    )


def _refuse_half_set(variables: Mapping[str, str]) -> None:
    """Keep a process that has lost half of its variables from training alone."""
    present = [name for name in ("RANK", "WORLD_SIZE") if name in variables]
    if len(present) == 1:
        missing = "RANK" if present == ["WORLD_SIZE"] else "WORLD_SIZE"
        raise LaunchError(
            f"{present[0]}={variables[present[0]]} is set but {missing} is not: start with `deepspeed` or `torchrun`, "
            f"which set both, or unset {present[0]} for a run of one process"
        )
    if "PMIX_RANK" in variables and not any(name in variables for launcher in _LAUNCHERS for name in launcher.rank):
        raise LaunchError(
            f"PMIX_RANK={variables['PMIX_RANK']} is set, which does not tell the number of ranks: start with mpirun or "
            "srun, or export RANK, WORLD_SIZE and LOCAL_RANK to each process"
        )


def _refuse_batch_script(variables: Mapping[str, str]) -> None:
    """Keep the batch script of a job of several tasks from training in one process."""
    in_step = {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"} & set(variables)
    if in_step or "SLURM_JOB_ID" not in variables or "SLURM_PROCID" not in variables:
        return
    others = [name for launcher in _LAUNCHERS if launcher is not SRUN for name in launcher.rank if name in variables]
    if not others and _integer(variables, ("SLURM_NTASKS",), 1) > 1:
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
        master_address=_master_address(launcher, variables, world_size),
        master_port=_master_port(variables, world_size),
        launcher=launcher.name,
        agent_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "RANK" in launcher.rank,
        attempt=_integer(variables, ("TORCHELASTIC_RESTART_COUNT",), 0),
    )


def _master_address(launcher: _Launcher, variables: Mapping[str, str], world_size: int) -> str:
    if "MASTER_ADDR" in variables:
        return variables["MASTER_ADDR"]
    here = next((variables[name] for name in _RANKS_ON_THIS_HOST if name in variables), None)
    if world_size == 1 or (launcher is not SRUN and here == str(world_size)):
        return "127.0.0.1"
    # The step of mpirun's daemons lacks the host that mpirun itself is on, which is rank 0's; srun may take a part.
    lists = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
    for name in ("SLURM_STEP_NODELIST", *lists) if launcher is SRUN else lists:
        if name in variables:
            return expand_nodelist(variables[name])[0]
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
