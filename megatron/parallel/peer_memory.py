"""Memory of GPUs of one host that other ranks may read, and flags between them that no kernel waits for.

A kernel that waits for a flag needs a place on a multiprocessor, behind a product that has them all. Here the streams
themselves write and wait (CUDA driver API, "Stream Memory Operations"), in graphs as well.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.errors import ConfigError
from megatron.parallel.peer_copies import ALIGNMENT, FREE, NUM_FLAGS, PeerMemory

NUM_BYTES = 2**26
"""Of a buffer: large enough that the time of a piece is that of its bytes."""
FLAG_BYTES = 4
EQUAL = 1
"""CU_STREAM_WAIT_VALUE_EQ."""
NEEDS = "--tp-comm-by-copies needs tensor ranks on GPUs of one host that reach each other's memory"


def open_peer_memory(handle: dist.ProcessGroup, device: torch.device) -> PeerMemory:
    """Let the ranks of a group, who call this together, read a buffer on each one's device.

    Raises:
        ConfigError: they are no GPUs of one host that reach each other's memory.
    """
    if device.type != "cuda":
        raise ConfigError([f"{NEEDS}, and this run computes on a {device.type}: leave it out"])
    hosts: list[str] = [""] * handle.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=handle)
    if len(set(hosts)) > 1:
        raise ConfigError(
            [
                f"{NEEDS}, and the ranks that share layers are on {', '.join(sorted(set(hosts)))}: leave it out, or "
                f"use a --tensor-model-parallel-size that divides the GPUs of a host"
            ]
        )
    try:
        return _SymmetricMemory(handle, device)
    except (RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ConfigError([f"{NEEDS}, which failed here ({said}): leave it out"]) from error


class _SymmetricMemory:
    """See `megatron.parallel.peer_copies.PeerMemory`."""

    def __init__(self, handle: dist.ProcessGroup, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory  # a module that runs without it do not load

        self.rank, self.size = handle.rank(), handle.size()
        self.num_bytes = NUM_BYTES - NUM_BYTES % (ALIGNMENT * self.size)
        num_flags = NUM_FLAGS * self.size
        memory = symmetric_memory.empty(NUM_BYTES + FLAG_BYTES * num_flags, dtype=torch.uint8, device=device)
        shared: Any = symmetric_memory.rendezvous(memory, handle.group_name)
        self._driver = _Driver()
        self._own = memory  # the others read it for as long as this lives
        flags = shared.get_buffer(self.rank, (num_flags,), torch.int32, NUM_BYTES // FLAG_BYTES)
        flags.zero_()[FREE * self.size : (FREE + 1) * self.size] = 1
        self._buffers = [shared.get_buffer(rank, (self.num_bytes,), torch.uint8) for rank in range(self.size)]
        self._flags: Sequence[int] = [int(address) + NUM_BYTES for address in shared.buffer_ptrs]
        self._stream = torch.cuda.Stream(device, priority=-1)
        torch.cuda.synchronize(device)
        dist.barrier(group=handle)  # nobody tells a flag before its first value is there

    def buffer(self, rank: int) -> Tensor:
        """Return a rank's buffer, as this rank's GPU sees it."""
        return self._buffers[rank]

    def tell(self, rank: int, flag: int) -> None:
        """Write a flag into another GPU's memory."""
        self._driver.write(self._place(rank, flag, self.rank), 1)

    def take(self, rank: int, flag: int) -> None:
        """Let the stream wait for a flag in this GPU's memory."""
        place = self._place(self.rank, flag, rank)
        self._driver.wait(place, 1)
        self._driver.write(place, 0)

    def _place(self, at: int, flag: int, of: int) -> int:
        return self._flags[at] + FLAG_BYTES * (flag * self.size + of)

    @contextmanager
    def beside(self) -> Iterator[Callable[[], None]]:
        """Issue copies to a stream of their own."""
        done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield lambda: torch.cuda.current_stream().wait_event(done)
            done.record()


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
