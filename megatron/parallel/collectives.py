"""Collectives that autograd can differentiate, in conjugate pairs: the backward of one is the forward of the other.

On a group of one each of them returns its input. Activations are [s, b, h]; dim 0 is the sequence.

| forward                   | backward       | from -> to                                               |
|---------------------------|----------------|----------------------------------------------------------|
| `copy_to_group`           | all-reduce     | same on all ranks -> same, each rank computes a part     |
| `reduce_from_group`       | identity       | a summand on each rank -> their sum on all               |
| `gather_dim`              | split          | a slice on each rank -> all slices on all                |
| `split_dim`               | gather         | same on all ranks -> this rank's slice                   |
| `all_gather_sequence`     | reduce-scatter | sequence shard -> whole, each rank computes a part       |
| `reduce_scatter_sequence` | all-gather     | a summand of the whole on each rank -> shard of the sum  |

The first and third pair move the same data forward and differ in what they take the gradient of a gathered tensor to
be: complete on every rank (`gather_dim`), or a summand on each (`all_gather_sequence`).

The last one can be had as its start and its end, between which something else may run, in backward as well. Of the
last but one there is a start, `start_gathering_sequence`, whose end is a product (`linear.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.groups import Group

# torch 2.13 renamed these two; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(NamedTuple):
    """A collective under way: its output may be read after `wait`, its input may not be changed before."""

    output: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Make the output ready (on a GPU: for what the current stream does next) and return it."""
        if self.work is not None:
            self.work.wait()
        return self.output


def start_all_reduce(tensor: Tensor, group: Group) -> Pending:
    """Start to sum `tensor` over the group, in place; give it a contiguous tensor that nobody else reads."""
    if group.size == 1:
        return Pending(tensor, None)
    return Pending(tensor, dist.all_reduce(tensor, group=group.handle, async_op=True))


def start_all_gather(shard: Tensor, group: Group) -> Pending:
    """Start to concatenate the shards of all ranks along dim 0."""
    if group.size == 1:
        return Pending(shard, None)
    shard = shard.contiguous()
    whole = shard.new_empty(group.size * shard.shape[0], *shard.shape[1:])
    return Pending(whole, _all_gather(whole, shard, group=group.handle, async_op=True))


def start_reduce_scatter(summand: Tensor, group: Group) -> Pending:
    """Start to sum `summand` over the group; each rank gets its slice of the sum along dim 0."""
    if group.size == 1:
        return Pending(summand, None)
    summand = summand.contiguous()
    shard = summand.new_empty(slice_length(summand, 0, group), *summand.shape[1:])
    return Pending(shard, _reduce_scatter(shard, summand, group=group.handle, async_op=True))


class Exchange:
    """Hands a collective under way from the autograd node that starts it to the one that waits for it.

    Two nodes share one. In backward they swap their parts, and the collective is the conjugate one.
    """

    __slots__ = ("_pending", "group")

    def __init__(self, group: Group) -> None:
        self.group = group
        self._pending: Pending | None = None

    def put(self, pending: Pending) -> Tensor:
        """Leave a collective; returns its output, which nobody may read before the other node has taken it."""
        self._pending = pending
        return pending.output

    def take(self) -> Tensor:
        """Wait for the collective and return its output, of which nothing stays here."""
        pending, self._pending = self._pending, None
        if pending is None:
            raise RuntimeError("a collective is waited for that was not started, or twice")
        return pending.wait()


class Gathering(NamedTuple):
    """A sequence that is being gathered: for one product, whose gradient comes back to the shard."""

    shard: Tensor
    exchange: Exchange


class Scattering(NamedTuple):
    """A sum over the group that is under way to its shards; without an exchange it is there."""

    shard: Tensor
    exchange: Exchange | None = None

    def wait(self) -> Tensor:
        """Return this rank's shard of the sum."""
        return self.shard if self.exchange is None else _EndScattering.apply(self.shard, self.exchange)


def copy_to_group(tensor: Tensor, group: Group) -> Tensor:
    """Hand a tensor that all ranks have to computations of which each rank does a part."""
    return tensor if group.size == 1 else _Copy.apply(tensor, group)


def reduce_from_group(tensor: Tensor, group: Group) -> Tensor:
    """Sum the ranks' tensors; every rank gets the sum."""
    return tensor if group.size == 1 else _Reduce.apply(tensor, group)


def gather_dim(tensor: Tensor, group: Group, dim: int = -1) -> Tensor:
    """Concatenate the ranks' slices along `dim`, for computations that every rank does alike."""
    return tensor if group.size == 1 else _Gather.apply(tensor, group, dim)


def split_dim(tensor: Tensor, group: Group, dim: int = -1) -> Tensor:
    """Keep this rank's slice along `dim` of a tensor that all ranks have alike.

    Raises:
        ValueError: the ranks do not divide the dimension.
    """
    return tensor if group.size == 1 else _Split.apply(tensor, group, dim)


def all_gather_sequence(shard: Tensor, group: Group) -> Tensor:
    """Concatenate the sequence shards [s/t, ...] to [s, ...], for computations of which each rank does a part."""
    return shard if group.size == 1 else _AllGatherSequence.apply(shard, group)


def reduce_scatter_sequence(summand: Tensor, group: Group) -> Tensor:
    """Sum the ranks' tensors [s, ...] and keep this rank's sequence shard [s/t, ...] of the sum.

    Raises:
        ValueError: the ranks do not divide the sequence.
    """
    return start_scattering_sequence(summand, group).wait()


def start_scattering_sequence(summand: Tensor, group: Group) -> Scattering:
    """Start `reduce_scatter_sequence`. In backward the gradient is gathered while what came after the start goes on.

    Raises:
        ValueError: the ranks do not divide the sequence.
    """
    if group.size == 1:
        return Scattering(summand)
    exchange = Exchange(group)
    return Scattering(_StartScattering.apply(summand, exchange), exchange)


def start_gathering_sequence(shard: Tensor, group: Group) -> Gathering:
    """Start `all_gather_sequence`, for the product that will take it.

    In backward that product starts to sum the gradient over the group, and this node waits for its shard.
    """
    exchange = Exchange(group)
    return Gathering(_StartGathering.apply(shard, exchange), exchange)


class _Copy(torch.autograd.Function):
    """Identity forward, all-reduce backward. Conjugate: `_Reduce`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    """All-reduce forward, identity backward. Conjugate: `_Copy`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return _sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """All-gather along `dim` forward, split backward. Conjugate: `_Split`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _concatenate(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own_slice(grad, ctx.group, ctx.dim), None, None


class _Split(torch.autograd.Function):
    """Split along `dim` forward, all-gather backward. Conjugate: `_Gather`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own_slice(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _concatenate(grad, ctx.group, ctx.dim), None, None


class _AllGatherSequence(torch.autograd.Function):
    """All-gather along dim 0 forward, reduce-scatter backward. Conjugate: `_StartScattering` with `_EndScattering`."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_all_gather(shard, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter(grad, ctx.group).wait(), None


class _StartScattering(torch.autograd.Function):
    """Start a reduce-scatter along dim 0 forward, wait for an all-gather backward. Conjugate: `_EndScattering`.

    What forward gives may not be read before the end, nor what the end gives in backward before this.
    """

    @staticmethod
    def forward(ctx: Any, summand: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.put(start_reduce_scatter(summand, exchange.group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.take(), None


class _EndScattering(torch.autograd.Function):
    """Wait for a reduce-scatter forward, start an all-gather backward. Conjugate: `_StartScattering`."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.take()
        return shard.view_as(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.put(start_all_gather(grad, ctx.exchange.group))
        return grad, None  # of the shape that autograd expects; the start takes what is gathered


class _StartGathering(torch.autograd.Function):
    """Start an all-gather forward, wait for a reduce-scatter backward, which the product at the other end starts."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.put(start_all_gather(shard, exchange.group))
        return shard.view_as(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.take(), None


def _sum(tensor: Tensor, group: Group) -> Tensor:
    # A copy, because others may read the tensor: a gradient flows into every branch of a sum as the same tensor.
    return start_all_reduce(tensor.clone(memory_format=torch.contiguous_format), group).wait()


def _concatenate(tensor: Tensor, group: Group, dim: int) -> Tensor:
    whole = start_all_gather(tensor, group).wait()
    return whole if dim == 0 else torch.cat(whole.chunk(group.size), dim=dim)


def _own_slice(tensor: Tensor, group: Group, dim: int) -> Tensor:
    length = slice_length(tensor, dim, group)
    # A copy: a view would keep the whole tensor in memory for as long as the slice lives.
    return tensor.narrow(dim, group.rank * length, length).clone(memory_format=torch.contiguous_format)


def slice_length(tensor: Tensor, dim: int, group: Group) -> int:
    """Give the length along `dim` of what each rank has of a tensor.

    Raises:
        ValueError: the ranks do not divide the dimension.
    """
    if tensor.shape[dim] % group.size:
        raise ValueError(
            f"dimension {dim} of a tensor of shape {tuple(tensor.shape)} cannot be divided over {group.size} ranks"
        )
    return tensor.shape[dim] // group.size
