"""Peer memory on a CPU: files that the processes of a group map into their memory, and flags that they poll."""

import math
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.parallel import groups
from megatron.parallel.peer_copies import ALIGNMENT, FREE, NUM_FLAGS, SLOTS, PeerCopies
from megatron.parallel.peer_memory import open_peer_memory

PATIENCE_SECONDS = 60


class MappedMemory:
    """See `megatron.parallel.peer_copies.PeerMemory`; small, so that shards go in pieces.

    Args:
        handle: of the group, over gloo.
        delays: draws seconds to sleep before each flag, so that ranks come to it in every order.
    """

    def __init__(self, handle, delays=lambda: 0.0):
        self.rank, self.size = handle.rank(), handle.size()
        self.num_bytes, self._delays = 2 * ALIGNMENT, delays
        names = [tempfile.mkdtemp(prefix="peers-") if self.rank == 0 else ""]
        dist.broadcast_object_list(names, group=handle, group_src=0)
        folder = Path(names[0])

        def mapped(name, *shape, dtype=torch.int32):
            size = math.prod(shape)
            return torch.from_file(str(folder / name), shared=True, size=size, dtype=dtype, device="cpu").view(shape)

        def flags(rank):
            return mapped(f"flags{rank}", NUM_FLAGS, SLOTS, self.size)

        def rooms(rank):
            return mapped(f"rooms{rank}", SLOTS, self.size, self.num_bytes, dtype=torch.uint8)

        flags(self.rank).zero_()[FREE] = 1
        rooms(self.rank).zero_()
        dist.barrier(group=handle)
        self._flags = [flags(rank) for rank in range(self.size)]
        self._rooms = [rooms(rank) for rank in range(self.size)]
        dist.barrier(group=handle)
        if self.rank == 0:
            shutil.rmtree(folder)  # the memory stays for as long as it is mapped

    def room(self, at, of, slot):
        return self._rooms[at][slot, of]

    def tell(self, rank, flag, slot):
        time.sleep(self._delays())
        place = self._flags[rank][flag, slot, self.rank]
        assert place == 0, "a flag is set that nobody has taken"
        place.fill_(1)

    def take(self, rank, flag, slot):
        time.sleep(self._delays())
        place, until = self._flags[self.rank][flag, slot, rank], time.monotonic() + PATIENCE_SECONDS
        while place != 1:
            assert time.monotonic() < until, f"rank {self.rank} waits for flag {flag} of rank {rank}"
            time.sleep(0)
        place.fill_(0)

    def beside(self, action):
        """Act at once: what waits then for something that another rank's host comes to later waits for ever."""
        action()
        return lambda: None


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
    """Call a check whose tensor ranks copy shards into each other's memory."""
    from tests.model import test_halves
    from tests.parallel import logical

    sent, send = [], PeerCopies._send
    PeerCopies._send = lambda self, *part: (sent.append(part), send(self, *part))
    for module in (logical, test_halves):
        module.create_groups = partial(groups.create_groups, tensor_memory=open_anywhere)
    check(*args)
    assert sent
