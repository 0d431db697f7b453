"""Small agreements between the ranks of a run, on the host: a gloo group that never waits for a GPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Control:
    """What all ranks have to know alike: why to stop, which checkpoint to load, who failed."""

    def __init__(self, rank: int, size: int, handle: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.size = size
        self._handle = handle

    @classmethod
    def alone(cls) -> Control:
        """One rank, which agrees with itself."""
        return cls(0, 1, None)

    @classmethod
    def of_world(cls, timeout: timedelta) -> Control:
        """All ranks of the process group that was joined; alone where none was."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and reports."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """Agree on the largest of the ranks' values."""
        if self._handle is None:
            return value
        agreed = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._handle)
        return int(agreed)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self._handle is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._handle)
        return values

    def of_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._handle is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._handle)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._handle is not None:
            dist.barrier(group=self._handle)
