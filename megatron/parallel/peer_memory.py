"""Memory of GPUs of one host that other ranks write into, and flags between them that no kernel waits for.

A kernel that waits for a flag needs a place on a multiprocessor, behind a product that has them all. Here the streams
themselves write and wait (CUDA driver API, "Stream Memory Operations"), in graphs as well.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.errors import ConfigError
from megatron.parallel.peer_copies import ALIGNMENT, FREE, NUM_FLAGS, SLOTS, PeerMemory

NUM_BYTES = 2**28
"""Of the room on each GPU, for all other ranks together."""
FLAG_BYTES = 4
EQUAL = 1
"""CU_STREAM_WAIT_VALUE_EQ."""
NEEDS = "--tp-comm-overlap copies needs tensor ranks on GPUs of one host that reach each other's memory"


def open_peer_memory(handle: dist.ProcessGroup, device: torch.device) -> PeerMemory:
    """Let the ranks of a group, who call this together, write into room on each one's device.

    Raises:
        ConfigError: they are no GPUs of one host that reach each other's memory.
    """
    if device.type != "cuda":
        raise ConfigError([f"{NEEDS}, and this run computes on a {device.type}: use --tp-comm-overlap none"])
    hosts: list[str] = [""] * handle.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=handle)
    if len(set(hosts)) > 1:
        raise ConfigError(
            [
                f"{NEEDS}, and ranks that share layers are on {', '.join(sorted(set(hosts)))}: use a "
                f"--tensor-model-parallel-size that divides the GPUs of a host, or --tp-comm-overlap none"
            ]
        )
    try:
        return _SymmetricMemory(handle, device)
    except (RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ConfigError([f"{NEEDS}, which failed here ({said}): use --tp-comm-overlap none"]) from error


class _SymmetricMemory:
    """See `megatron.parallel.peer_copies.PeerMemory`."""

    def __init__(self, handle: dist.ProcessGroup, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory  # which runs without it do not load

        self.rank, self.size = handle.rank(), handle.size()
        self.num_bytes = NUM_BYTES // (SLOTS * (self.size - 1)) // ALIGNMENT * ALIGNMENT
        num_flags = NUM_FLAGS * SLOTS * self.size
        self._own = symmetric_memory.empty(NUM_BYTES + FLAG_BYTES * num_flags, dtype=torch.uint8, device=device)
        shared: Any = symmetric_memory.rendezvous(self._own, handle.group_name)
        self._driver = _Driver()
        self._rooms = [shared.get_buffer(rank, (NUM_BYTES,), torch.uint8) for rank in range(self.size)]
        self._flags = [int(address) + NUM_BYTES for address in shared.buffer_ptrs]
        flags = shared.get_buffer(self.rank, (NUM_FLAGS, SLOTS * self.size), torch.int32, NUM_BYTES // FLAG_BYTES)
        flags.zero_()[FREE] = 1
        self._stream = torch.cuda.Stream(device, priority=-1)
        torch.cuda.synchronize(device)
        dist.barrier(group=handle)  # nobody tells a flag before its first value is there

    def room(self, at: int, of: int, slot: int) -> Tensor:
        """Return the room at a rank for a piece of another one."""
        place = (slot * (self.size - 1) + of - (of > at)) * self.num_bytes
        return self._rooms[at][place : place + self.num_bytes]

    def tell(self, rank: int, flag: int, slot: int) -> None:
        """Write a flag into another GPU's memory."""
        self._driver.write(self._flag(rank, flag, slot, self.rank), 1)

    def take(self, rank: int, flag: int, slot: int) -> None:
        """Let the stream wait for a flag in this GPU's memory."""
        address = self._flag(self.rank, flag, slot, rank)
        self._driver.wait(address, 1)
        self._driver.write(address, 0)

    def _flag(self, at: int, flag: int, slot: int, of: int) -> int:
        return self._flags[at] + FLAG_BYTES * ((flag * SLOTS + slot) * self.size + of)

    def beside(self, action: Callable[[], None]) -> Callable[[], None]:
        """Let an action issue its copies to a stream of their own."""
        done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            action()
            done.record()
        return lambda: torch.cuda.current_stream().wait_event(done)


class _Driver:
    """Two functions of the driver, for the current stream."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
            function.restype = ctypes.c_int

    def write(self, address: int, value: int) -> None:
        """Write a number once the stream is there, after what it has copied."""
        _check(self._write(torch.cuda.current_stream().cuda_stream, address, value, 0))

    def wait(self, address: int, value: int) -> None:
        """Let the stream go on when the number at an address is this one."""
        _check(self._wait(torch.cuda.current_stream().cuda_stream, address, value, EQUAL))


def _check(result: int) -> None:
    if result != 0:
        raise RuntimeError(f"the CUDA driver refused a memory operation of a stream (CUresult {result})")
