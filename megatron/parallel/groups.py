"""Groups of ranks: who talks to whom. They are made once at start and handed to whatever needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron.parallel.mesh import AXES, Mesh
from megatron.parallel.peer_copies import PeerCopies, PeerMemory


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other, seen from one of them.

    Attributes:
        ranks: their global ranks, ascending.
        rank: this process's index in `ranks`, not its global rank.
        handle: what `torch.distributed` takes as `group`; None for a group of one, which never communicates.
        copies: what carries shards between the ranks while they multiply, in place of collectives.
    """

    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None
    copies: PeerCopies | None = None

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)

    @classmethod
    def alone(cls, global_rank: int = 0) -> Group:
        """Make a group of one: every collective on it returns its input."""
        return cls(ranks=(global_rank,), rank=0, handle=None)

    def sequence_shards(self, sequence_parallel: bool) -> Group:
        """Of a tensor group: the ranks that each hold another shard of the sequence outside of the sharded products.

        Returns:
            This group with Megatron's sequence parallelism; without it a group of one, since all ranks hold the whole.
        """
        return self if sequence_parallel else Group.alone(self.ranks[self.rank])


@dataclass(frozen=True)
class ParallelGroups:
    """The groups of one rank: along each axis of the mesh, and over several of them.

    Attributes:
        world: all ranks.
        replicas: the data and Ulysses axes together: ranks that hold the same weights and see other tokens, between
            which gradients are summed and ZeRO shards.
    """

    world: Group
    replicas: Group
    pipeline: Group
    data: Group
    ulysses: Group
    tensor: Group

    @classmethod
    def alone(cls) -> ParallelGroups:
        """Make the groups of a run on one rank, which needs no process group."""
        return cls(**dict.fromkeys(("world", "replicas", *AXES), Group.alone()))


def create_groups(
    mesh: Mesh,
    rank: int,
    timeout: timedelta | None = None,
    *,
    tensor_first: bool = False,
    tensor_memory: Callable[[dist.ProcessGroup], PeerMemory] | None = None,
) -> ParallelGroups:
    """Make every group of the mesh; all ranks call this together, once.

    Args:
        mesh: must have as many ranks as the initialised default process group (a mesh of one rank needs none).
        rank: this process's global rank.
        timeout: how long a rank waits for the others. torch does not hand the default group's value on to new
            groups, so it is to be given here once more.
        tensor_first: whether a GPU is to begin with collectives of the tensor group before it goes on with kernels that
            run beside them; these fill it otherwise, and the collective comes last.
        tensor_memory: how the ranks of the tensor group open memory to each other, if they are to copy shards.

    Raises:
        ValueError: the mesh and the process group differ in their number of ranks, or the mesh has no such rank.
    """
    running = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if mesh.world_size != running:
        raise ValueError(
            f"the mesh {mesh} has {mesh.world_size} ranks but {running} are running: "
            "the product of its sizes must equal the number of processes"
        )
    mesh.coordinates(rank)  # refuses a rank outside the mesh
    # Every process makes every group, also those it is not in, and all in the same order: torch pairs them by order.
    world = _create_own(mesh.lines(*AXES), rank, timeout)
    along = {
        axis: _create_own(mesh.lines(axis), rank, timeout, first=tensor_first and axis == "tensor") for axis in AXES
    }
    if tensor_memory is not None and (handle := along["tensor"].handle) is not None:
        along["tensor"] = replace(along["tensor"], copies=PeerCopies(tensor_memory(handle)))
    if 1 in (mesh.data, mesh.ulysses):  # then the plane is the line along the other: no second communicator
        replicas = max(along["data"], along["ulysses"], key=lambda line: line.size)
    else:
        replicas = _create_own(mesh.lines("data", "ulysses"), rank, timeout)
    return ParallelGroups(world=world, replicas=replicas, **along)


def _create_own(
    lines: Sequence[tuple[int, ...]], rank: int, timeout: timedelta | None, *, first: bool = False
) -> Group:
    """Make one group for each line and return the one that `rank` is in."""
    own = Group.alone(rank)
    for ranks in lines:
        handle = _create_handle(ranks, timeout, first)
        if rank in ranks:
            own = Group(ranks=ranks, rank=ranks.index(rank), handle=handle)
    return own


def _create_handle(ranks: tuple[int, ...], timeout: timedelta | None, first: bool) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    options = _options_of_first(timeout) if first else None
    if len(ranks) == dist.get_world_size() and options is None:
        return dist.group.WORLD  # one communicator less: its buffers are memory on every GPU
    return dist.new_group(list(ranks), timeout=timeout, pg_options=options)


def _options_of_first(timeout: timedelta | None) -> Any | None:
    """Give what makes NCCL use a stream of high priority; gloo has none."""
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if timeout is not None:
        options._timeout = timeout  # torch sets it in any case, and warns where it was another one
    return options
