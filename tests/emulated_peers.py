"""Peer memory on a CPU: files that the processes of a group map into their memory, and flags that they poll."""

import contextlib
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.parallel import groups
from megatron.parallel.peer_copies import ALIGNMENT, FREE, NUM_FLAGS, PeerCopies
from megatron.parallel.peer_memory import open_peer_memory

PATIENCE_SECONDS = 60


class MappedMemory:
    """See `megatron.parallel.peer_copies.PeerMemory`; small, so that what travels goes in pieces.

    Args:
        handle: of the group, over gloo.
        delays: draws seconds to sleep before each flag, so that ranks come to it in every order.
    """

    def __init__(self, handle, delays=lambda: 0.0):
        self.rank, self.size = handle.rank(), handle.size()
        self.num_bytes, self._delays = 2 * ALIGNMENT * self.size, delays
        names = [tempfile.mkdtemp(prefix="peers-")]
        dist.broadcast_object_list(names, group=handle, group_src=0)
        folder, num_flags = Path(names[0]), NUM_FLAGS * self.size

        def mapped(name, size, dtype):
            return torch.from_file(str(folder / name), shared=True, size=size, dtype=dtype, device="cpu")

        own = mapped(f"flags{self.rank}", num_flags, torch.int32).zero_()
        own[FREE * self.size : (FREE + 1) * self.size] = 1
        mapped(f"buffer{self.rank}", self.num_bytes, torch.uint8).zero_()
        dist.barrier(group=handle)
        self._flags = [mapped(f"flags{rank}", num_flags, torch.int32) for rank in range(self.size)]
        self._buffers = [mapped(f"buffer{rank}", self.num_bytes, torch.uint8) for rank in range(self.size)]

    def buffer(self, rank):
        return self._buffers[rank]

    def tell(self, rank, flag):
        time.sleep(self._delays())
        place = flag * self.size + self.rank
        assert self._flags[rank][place] == 0, "a flag is set that nobody has taken"
        self._flags[rank][place] = 1

    def take(self, rank, flag):
        time.sleep(self._delays())
        place, until = flag * self.size + rank, time.monotonic() + PATIENCE_SECONDS
        while self._flags[self.rank][place] != 1:
            assert time.monotonic() < until, f"rank {self.rank} waits for flag {flag} of rank {rank}"
            time.sleep(0)
        self._flags[self.rank][place] = 0

    @contextlib.contextmanager
    def beside(self):
        yield lambda: None


def irregular(rank):
    """Delays that differ from rank to rank."""
    return partial(random.Random(rank).choice, (0.0, 0.0, 0.002))


def open_anywhere(handle, device=None):
    """Open peer memory on the default device."""
    device = torch.get_default_device() if device is None else device
    return (
        MappedMemory(handle) if device.type == "cpu" else open_peer_memory(handle, torch.device("cuda", handle.rank()))
    )


def by_copies(check, *args):
    """Call a check whose tensor ranks copy shards out of each other's memory."""
    from tests.model import test_halves
    from tests.parallel import logical

    copied, fill = [], PeerCopies._fill
    PeerCopies._fill = lambda self, *parts: (copied.append(parts), fill(self, *parts))[1]
    for module in (logical, test_halves):
        module.create_groups = partial(groups.create_groups, tensor_memory=open_anywhere)
    check(*args)
    assert copied
