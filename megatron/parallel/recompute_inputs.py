"""Where the inputs of recomputed units wait for backward: spread over ranks, or in the host's memory."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron.parallel.collectives import start_all_gather
from megatron.parallel.groups import Group

Restore = Callable[[], Tensor]
"""Brings a tensor back as it was."""


def keep_inputs(inputs: Iterable[object], split_over: Group, *, on_host: bool) -> AbstractContextManager[Any]:
    """Within the context a checkpointed call keeps its inputs as asked: a share of each on a rank, in host memory.

    Activations are moved. Integers stay, and so do leaves that want a gradient, such as weights: their owner holds them
    anyway. torch hands the inputs of a checkpointed call, and nothing inside of it, to the hooks around the call.

    Args:
        inputs: of the call.
        split_over: ranks whose inputs are the same; they gather them in backward, all in the same order.
        on_host: whether inputs on an accelerator wait in pinned memory of the host. On the CPU they are there already.
    """
    if split_over.size == 1 and not on_host:
        return nullcontext()

    # By address, because the hooks are given detached aliases, which do not tell a leaf from an activation.
    moved = {input.data_ptr() for input in inputs if isinstance(input, Tensor) and _is_activation(input)}

    def pack(tensor: Tensor) -> Tensor | Restore:
        if tensor.data_ptr() not in moved:
            return tensor
        tensor = tensor.detach()
        share = tensor if split_over.size == 1 else _own_share(tensor, split_over)
        restore = _move_to_host(share) if on_host and share.device.type != "cpu" else lambda: share
        if split_over.size == 1:
            return restore
        return partial(_gather_shares, restore, split_over, tensor.shape)

    return saved_tensors_hooks(pack, lambda packed: packed if isinstance(packed, Tensor) else packed())


def _is_activation(tensor: Tensor) -> bool:
    is_held_elsewhere = tensor.is_leaf and tensor.requires_grad
    return tensor.is_floating_point() and tensor.numel() > 0 and not is_held_elsewhere


def _own_share(tensor: Tensor, group: Group) -> Tensor:
    """Copy this rank's share of the elements, the last one filled up with zeros."""
    length = -(-tensor.numel() // group.size)
    share = tensor.flatten()[group.rank * length : (group.rank + 1) * length]
    return F.pad(share, (0, length - share.numel())) if share.numel() < length else share.clone()


def _gather_shares(restore: Restore, group: Group, shape: torch.Size) -> Tensor:
    return start_all_gather(restore(), group).wait()[: shape.numel()].view(shape)


def _move_to_host(tensor: Tensor) -> Restore:
    return _Transfers.of(tensor.device).move_to_host(tensor)


def pinned_bytes(num_bytes: int) -> int:
    """Give the host memory that one such input takes: torch pins powers of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


class Buffers:
    """Memory that is made once and lent again: as much as was ever lent at a time, and of each size apart.

    Who takes a buffer uses it on one stream, where all that others did with it comes before.

    Args:
        make: gives memory of so many bytes, as uint8.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._spare: dict[int, list[Tensor]] = defaultdict(list)

    def lend(self, num_bytes: int, borrower: object) -> Tensor:
        """Give a buffer to an object; it comes back when that is gone."""
        spare = self._spare[num_bytes]
        buffer = spare.pop() if spare else self._make(num_bytes)
        weakref.finalize(borrower, spare.append, buffer).atexit = False
        return buffer


class _HostCopy:
    """A tensor in pinned memory, and on its device again once it has been fetched."""

    def __init__(self, tensor: Tensor, transfers: _Transfers, before: _HostCopy | None) -> None:
        self.transfers = transfers
        self.before = None if before is None else weakref.ref(before)
        self.fetched: Tensor | None = None
        module = transfers.module
        transfers.stream.wait_stream(module.current_stream(transfers.device))
        with module.stream(transfers.stream):
            self.buffer = transfers.buffers.lend(tensor.nbytes, self).view(tensor.dtype).view(tensor.shape)
            self.buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(transfers.stream)  # its memory is not reused before the copy is done

    def fetch(self) -> Tensor:
        """Start to copy it back, unless that is under way."""
        if self.fetched is None:
            with self.transfers.module.stream(self.transfers.stream):
                self.fetched = self.buffer.to(self.transfers.device, non_blocking=True)
        return self.fetched

    def __call__(self) -> Tensor:
        """Give it back, and start on the one that was stored before it: backward needs them in reverse."""
        tensor, self.fetched = self.fetch(), None
        current = self.transfers.module.current_stream(self.transfers.device)
        current.wait_stream(self.transfers.stream)
        tensor.record_stream(current)
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return tensor


class _Transfers:
    """The copies between one device and the host: on a stream of their own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device)
        self.stream = self.module.Stream(device)
        self.last: weakref.ref[_HostCopy] | None = None
        # All copies are on one stream, so that a buffer may be written as soon as the reading of it has been asked for;
        # torch's own pool would wait for that, and pin more while the host is ahead of the device.
        self.buffers = Buffers(partial(torch.empty, dtype=torch.uint8, device="cpu", pin_memory=True))

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> _Transfers:
        """Return the one of a device."""
        return _Transfers(device)

    def move_to_host(self, tensor: Tensor) -> Restore:
        """Start to copy a tensor into pinned memory."""
        copy = _HostCopy(tensor, self, None if self.last is None else self.last())
        self.last = weakref.ref(copy)
        return copy
