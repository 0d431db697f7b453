"""Replicated parameters that each rank uses on its shard of the activations: their gradients sum up over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from megatron.parallel.collectives import start_all_reduce
from megatron.parallel.groups import Group


def sum_gradients(parameters: Sequence[nn.Parameter], group: Group) -> tuple[Tensor, ...]:
    """Read replicated parameters, of one dtype, that this rank uses on its shard of the activations only.

    Each rank's backward sees the parts of their gradients that stem from its shard. Read through here, the parameters
    receive the sums of all parts on every rank, before any engine, hook or accumulation sees them.
    """
    alone = group.size == 1 or not parameters
    return tuple(parameters) if alone else _SumGradients.apply(group, *parameters)


class _SumGradients(torch.autograd.Function):
    """Identity forward, one all-reduce of all gradients backward."""

    @staticmethod
    def forward(ctx: Any, group: Group, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sums = start_all_reduce(torch.cat([grad.flatten() for grad in grads]), ctx.group).wait()
        parts = sums.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


class SumsGradients(nn.Module, ABC):
    """A module that reads such parameters through `read`, whose backward sums their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[Tensor] = []  # filled and cleared in place: a module takes long to set an attribute

    @property
    @abstractmethod
    def summed_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters, in the order in which `read` gives them."""

    @property
    @abstractmethod
    def summing_group(self) -> Group:
        """The ranks over which their gradients sum up."""

    def read(self) -> tuple[Tensor, ...]:
        """Give the parameters, to be used on this rank's shard."""
        if self._held:
            return tuple(self._held)
        return sum_gradients(self.summed_parameters, self.summing_group)


def readers_over(group: Group, module: nn.Module) -> list[SumsGradients]:
    """Find in a module those that have parameters whose gradients sum up over several ranks, these ones."""
    return [
        reader
        for reader in module.modules()
        if isinstance(reader, SumsGradients)
        and reader.summing_group is group
        and group.size > 1
        and reader.summed_parameters
    ]


@contextmanager
def read_together(readers: Sequence[SumsGradients], group: Group) -> Iterator[None]:
    """Within the context the parameters of readers, of `readers_over`, are read once, however often they are used.

    One collective then sums the gradients of all of them, when backward comes to the beginning of the context. Read
    where they are used, each use has a collective of its own, so small that the time is that of starting it.
    """
    parameters = [reader.summed_parameters for reader in readers]
    whole = sum_gradients(list(chain.from_iterable(parameters)), group)
    ends = accumulate(map(len, parameters))
    for reader, own, end in zip(readers, parameters, ends, strict=True):
        reader._held.extend(whole[end - len(own) : end])
    try:
        yield
    finally:
        for reader in readers:
            reader._held.clear()
