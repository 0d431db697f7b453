"""Copies of a rank's fragments in the memory of its host, from which a save is written while the training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.checkpoint.fragments import Fragment


class HostCopies:
    """Buffers that are made at the first save and used again at each one; page-locked for what lies on a device."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, int], Tensor] = {}

    def missing_bytes(self, fragments: Sequence[Fragment]) -> int:
        """Memory that a copy of the fragments will take beyond what is there."""
        return sum(
            fragment.tensor.numel() * fragment.tensor.element_size()
            for fragment in fragments
            if not self._fits(fragment)
        )

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Copy the fragments; when it returns, what they are views of may change."""
        devices = {fragment.tensor.device for fragment in fragments}
        _synchronize(devices)  # the step may have ended on other streams
        copies = []
        for fragment in fragments:
            tensor = fragment.tensor.detach()
            if not self._fits(fragment):
                on_host = tensor.device.type == "cpu"
                self._buffers[_key(fragment)] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not on_host)
            buffer = self._buffers[_key(fragment)]
            buffer.copy_(tensor, non_blocking=True)
            copies.append(replace(fragment, tensor=buffer))
        _synchronize(devices)
        return copies

    def _fits(self, fragment: Fragment) -> bool:
        buffer = self._buffers.get(_key(fragment))
        return buffer is not None and (buffer.shape, buffer.dtype) == (fragment.tensor.shape, fragment.tensor.dtype)


def _synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)


def _key(fragment: Fragment) -> tuple[str, str, int]:
    return fragment.name, fragment.kind, fragment.start
