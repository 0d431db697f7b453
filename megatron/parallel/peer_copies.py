"""Swaps by the copy engines of GPUs that reach each other's memory: no processor of a GPU takes part.

Every rank has a buffer that its peers can write to: for each distance some slots, and for each slot two numbers.

    rank r                                    rank r + distance
    ------                                    -----------------
    wait until freed[slot] >= n - slots  <--  freed[slot] = n - slots   after the slot has been read
    copy the piece                       -->  slot
    arrived[slot] = n                    -->  wait until arrived[slot] >= n, read the slot

n counts the swaps of a distance. The numbers are written and waited for by the streams themselves (stream memory
operations of CUDA's driver); the host only asks for it. What a stream waits for, all peers have asked for before they
ask for anything that waits for this rank's later work: so the ranks cannot block each other, even where the hardware
runs all streams of a GPU in the order of the host's calls.
"""

from __future__ import annotations

import ctypes
import socket
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.groups import Group
from megatron.parallel.transport import Swap

FLAG_BYTES = 64
"""Apart from each other by this much: writes of different peers should not meet in one line of a cache."""


class PeerCopiesUnavailableError(Exception):
    """Copies between the GPUs of a group are impossible here; the message says why, in half a sentence."""


class Driver:
    """Calls of CUDA's driver for which torch has no name; streams and addresses are numbers.

    Raises:
        PeerCopiesUnavailableError: there is no such library.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
            self._copy = library.cuMemcpyAsync
            self._write = library.cuStreamWriteValue32_v2
            self._wait = library.cuStreamWaitValue32_v2
        except (OSError, AttributeError) as error:
            raise PeerCopiesUnavailableError(f"CUDA's driver is missing or too old ({error})") from error
        pointer, number = ctypes.c_uint64, ctypes.c_uint32
        self._copy.argtypes = [pointer, pointer, ctypes.c_size_t, ctypes.c_void_p]
        self._write.argtypes = self._wait.argtypes = [ctypes.c_void_p, pointer, number, ctypes.c_uint]

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        """Copy, after what the stream has to do so far."""
        _check("copy", self._copy(target, source, num_bytes, stream))

    def write(self, stream: int, address: int, value: int) -> None:
        """Write a number, visible to all GPUs after everything that the stream did before."""
        _check("write a number", self._write(stream, address, value & 0xFFFFFFFF, 0))

    def wait(self, stream: int, address: int, value: int) -> None:
        """Let the stream go on when the number is at least `value`, counted with wrap-around."""
        _check("wait for a number", self._wait(stream, address, value & 0xFFFFFFFF, 0))


def _check(what: str, code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA's driver refused to {what} in memory that GPUs share: code {code}")


class PeerCopies:
    """Swaps by copy engines; all ranks of the group make it together.

    Args:
        group: ranks on one host, two at least.
        device: this rank's GPU.
        piece_bytes: the most that a piece may have.
        slots: how many swaps of one distance may be under way. The buffer has `piece_bytes` for each of them and each
            other rank of the group.

    Raises:
        PeerCopiesUnavailableError: the ranks cannot reach each other's memory; raised on all of them.
    """

    name = "copies"

    def __init__(self, group: Group, device: torch.device, piece_bytes: int = 2**24, slots: int = 4) -> None:
        self.group = group
        self.piece_bytes = piece_bytes
        self.slots = slots
        self._flags = 2 * (group.size - 1) * slots * FLAG_BYTES
        _agree(group, _why_not_here(device))
        self._driver = Driver()
        self._buffer, self._addresses = self._share(device)
        self._sending, self._receiving = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._started = [0] * group.size
        self._open = [0] * group.size

    def swap(self, outgoing: Tensor, distance: int, into: Tensor | None = None) -> Swap:
        """See `Transport.swap`.

        Raises:
            ValueError: the piece is larger than a slot.
            RuntimeError: more swaps are under way than there are slots.
        """
        if outgoing.nbytes > self.piece_bytes:
            raise ValueError(f"a piece of {outgoing.nbytes} bytes is larger than a slot, {self.piece_bytes} bytes")
        if into is None:
            if self._open[distance] == self.slots:
                raise RuntimeError(f"{self.slots} swaps are under way already: each needs a slot until it is done")
            self._open[distance] += 1
        self._started[distance] += 1
        return _Copy(self, outgoing, distance, self._started[distance], into)

    def place(self, source: Tensor, into: Tensor) -> None:
        """See `Transport.place`."""
        self._receiving.wait_stream(torch.cuda.current_stream())
        self._driver.copy(self._receiving.cuda_stream, into.data_ptr(), source.data_ptr(), source.nbytes)

    def _share(self, device: torch.device) -> tuple[Tensor, list[int]]:
        """Make the buffer and return it with the addresses of all ranks' buffers."""
        import torch.distributed._symmetric_memory as symmetric_memory  # says so when torch moves it, on GPUs alone

        problem, handle = None, cast(dist.ProcessGroup, self.group.handle)
        buffer, addresses = torch.empty(0, dtype=torch.uint8), [0]
        num_bytes = self._flags + (self.group.size - 1) * self.slots * self.piece_bytes
        try:
            buffer = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
            buffer[: self._flags].zero_()
            torch.cuda.synchronize(device)
            shared: Any = symmetric_memory.rendezvous(buffer, handle)
            addresses = [
                shared.get_buffer(rank, (num_bytes,), torch.uint8).data_ptr() for rank in range(self.group.size)
            ]
        except RuntimeError as error:
            problem = f"the GPUs cannot share memory ({str(error).splitlines()[0]})"
        _agree(self.group, problem)
        return buffer, addresses

    def _slot(self, distance: int, number: int) -> int:
        """Index of the slot that a swap uses, among all distances."""
        return (distance - 1) * self.slots + number % self.slots

    def _place_of(self, slot: int) -> int:
        """Where a slot begins in the buffer of each rank."""
        return self._flags + slot * self.piece_bytes


class _Copy:
    """A swap by copy engines: number `number` of its distance."""

    def __init__(
        self, transport: PeerCopies, outgoing: Tensor, distance: int, number: int, into: Tensor | None
    ) -> None:
        group, driver = transport.group, transport._driver
        slot = transport._slot(distance, number)
        self._transport, self._outgoing, self._into = transport, outgoing, into
        self._distance, self._number, self._slot = distance, number, slot
        own = transport._addresses[group.rank]
        target, source = (transport._addresses[(group.rank + places) % group.size] for places in (distance, -distance))
        self._arrived = own + 2 * slot * FLAG_BYTES
        self._freed = source + (2 * slot + 1) * FLAG_BYTES
        ready = torch.cuda.current_stream().record_event()

        sending = transport._sending
        sending.wait_event(ready)
        stream = sending.cuda_stream
        if number > transport.slots:
            driver.wait(stream, own + (2 * slot + 1) * FLAG_BYTES, number - transport.slots)
        driver.copy(stream, target + transport._place_of(slot), outgoing.data_ptr(), outgoing.nbytes)
        driver.write(stream, target + 2 * slot * FLAG_BYTES, number)
        self._sent = sending.record_event()
        self._put = None if into is None else self._put_into(into, ready)

    def _put_into(self, into: Tensor, ready: torch.cuda.Event) -> torch.cuda.Event:
        """Copy what arrives to its place, beside the current stream; `ready`: its memory is free from there on."""
        transport, driver = self._transport, self._transport._driver
        receiving = transport._receiving
        receiving.wait_event(ready)
        stream = receiving.cuda_stream
        slot = transport._addresses[transport.group.rank] + transport._place_of(self._slot)
        driver.wait(stream, self._arrived, self._number)
        driver.copy(stream, into.data_ptr(), slot, into.nbytes)
        driver.write(stream, self._freed, self._number)
        return receiving.record_event()

    def wait(self) -> Tensor:
        current = torch.cuda.current_stream()
        current.wait_event(self._sent)
        if self._into is not None and self._put is not None:
            current.wait_event(self._put)
            return self._into
        self._transport._driver.wait(current.cuda_stream, self._arrived, self._number)
        first, like = self._transport._place_of(self._slot), self._outgoing
        return self._transport._buffer[first : first + like.nbytes].view(like.dtype).view(like.shape)

    def done(self) -> None:
        if self._into is None:
            self._transport._open[self._distance] -= 1
            self._transport._driver.write(torch.cuda.current_stream().cuda_stream, self._freed, self._number)


def _why_not_here(device: torch.device) -> str | None:
    """Say why this rank cannot take part; None when it can, as far as it knows."""
    if device.type != "cuda":
        return f"there are no copy engines on {device.type}"
    try:
        Driver()
    except PeerCopiesUnavailableError as error:
        return str(error)
    return None


def _agree(group: Group, problem: str | None) -> None:
    """Compare what keeps the ranks from sharing memory.

    Raises:
        PeerCopiesUnavailableError: at least one has a problem, or they are on several hosts.
    """
    answers: list[Any] = [None] * group.size
    dist.all_gather_object(answers, (problem, _host()), group=group.handle)
    problems = [found for found, _ in answers if found is not None]
    if problems:
        raise PeerCopiesUnavailableError(problems[0])
    if len({host for _, host in answers}) > 1:
        raise PeerCopiesUnavailableError("the tensor ranks are on several hosts")


def _host() -> str:
    """Tell this host from others; containers of one host may have names of their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else socket.gethostname()
