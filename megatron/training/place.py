"""Where a process runs and with whom: its device, its groups of ranks, its random streams."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch

from megatron.config.derived import data_parallel_size
from megatron.config.parallel import ParallelConfig
from megatron.engine.launch import start
from megatron.engine.launchers import RankEnvironment
from megatron.parallel.groups import ParallelGroups, create_groups
from megatron.parallel.mesh import Mesh
from megatron.parallel.peer_memory import open_peer_memory
from megatron.parallel.random import RandomStreams, seed_everything
from megatron.training.control import Control
from megatron.training.rank_table import Seat, describe_ranks


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process runs and with whom; `rank_table` are the lines that tell it of all ranks."""

    device: torch.device
    groups: ParallelGroups
    control: Control
    streams: RandomStreams
    rank_table: tuple[str, ...] = ()

    @property
    def layout(self) -> dict[str, int]:
        """The degrees of the mesh, over which a checkpoint's files are split, by field of the config."""
        return {
            "data_parallel_size": self.groups.data.size,
            "tensor_model_parallel_size": self.groups.tensor.size,
            "pipeline_model_parallel_size": self.groups.pipeline.size,
            "ds_sequence_parallel_size": self.groups.ulysses.size,
        }


def join_ranks(parallel: ParallelConfig, seed: int, environment: RankEnvironment) -> Place:
    """Meet the other ranks, take this one's place in the mesh and seed its random streams.

    Raises:
        ConfigError: tensor ranks are to copy shards, and do not reach each other's memory.
    """
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    device = start(environment, timeout)
    mesh = Mesh(
        pipeline=parallel.pipeline_model_parallel_size,
        data=data_parallel_size(parallel, environment.world_size),
        ulysses=parallel.ds_sequence_parallel_size,
        tensor=parallel.tensor_model_parallel_size,
    )
    groups = create_groups(
        mesh,
        environment.rank,
        timeout,
        tensor_first=takes_halves(parallel),
        tensor_memory=partial(open_peer_memory, device=device) if parallel.tp_comm_overlap == "copies" else None,
    )
    streams = seed_everything(seed, groups, device)
    control = Control.of_world(timeout)
    table = describe_ranks(mesh, [Seat(*seat) for seat in control.gather((socket.gethostname(), str(device)))])
    return Place(device=device, groups=groups, control=control, streams=streams, rank_table=tuple(table))


def takes_halves(parallel: ParallelConfig) -> bool:
    """Whether blocks take a micro-batch in two halves: where tensor ranks have something to send."""
    return parallel.tp_comm_overlap == "halves" and parallel.tensor_model_parallel_size > 1
