"""A sequence taken a chunk at a time, so that what is wide exists for the tokens of one chunk alone.

Legend: s sequence, b micro-batch, h hidden, t tensor ranks, c positions of a chunk on a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.parallel.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron.parallel.groups import Group


@dataclass(frozen=True, kw_only=True)
class SequenceChunks:
    """How tensor ranks go through a sequence together.

    A chunk is made of whole positions, of every rank's shard with sequence parallelism, and has one at least.

    Attributes:
        group: the tensor group.
        size: tokens of a chunk, on all ranks together.
        sequence_parallel: whether hidden states are shards of the sequence.
    """

    group: Group
    size: int
    sequence_parallel: bool = False

    @property
    def shards(self) -> int:
        """Shards of the sequence that a chunk takes its positions from."""
        return self.group.size if self.sequence_parallel else 1

    def positions(self, batch: int) -> int:
        """Count the positions of a chunk on a rank."""
        return max(1, self.size // max(1, batch * self.shards))

    def cut(self, hidden: Tensor) -> list[slice]:
        """Cut dim 0 of [s, b, h], or of [s/t, b, h] with sequence parallelism."""
        length, batch, _ = hidden.shape
        step = self.positions(batch)
        return [slice(start, min(start + step, length)) for start in range(0, length, step)]

    def gathered(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Give each chunk, and its positions of all ranks, [c, b, h] or [t c, b, h], while the next ones travel."""
        chunks = self.cut(hidden)
        arriving = [self._gather(hidden, chunks[0])] if chunks else []
        for index, chunk in enumerate(chunks):
            whole = arriving.pop().wait()
            arriving += [self._gather(hidden, following) for following in chunks[index + 1 : index + 2]]
            yield chunk, whole

    def reduce(self, summand: Tensor) -> Pending:
        """Start to sum a chunk over the ranks: each gets its own positions with sequence parallelism, else all."""
        if self.group.size == 1:
            return Pending(summand, None)
        if self.sequence_parallel:
            return start_reduce_scatter(summand, self.group)
        return start_all_reduce(summand.clone(), self.group)  # a copy: recompute may have kept the summand

    def _gather(self, hidden: Tensor, chunk: slice) -> Pending:
        own = hidden[chunk]
        return Pending(own, None) if self.shards == 1 else start_all_gather(own, self.group)


class Arrivals:
    """Chunks of a tensor, each written to its place when the sum of the next one has been started."""

    def __init__(self, to: Tensor) -> None:
        self._to = to
        self._pending: tuple[slice, Pending] | None = None

    def expect(self, chunk: slice, pending: Pending) -> None:
        """Write what came before, and take note of a chunk that is under way."""
        self.finish()
        self._pending = (chunk, pending)

    def expect_product(self, chunk: slice, chunks: SequenceChunks, left: Tensor, right: Tensor) -> None:
        """Expect left right, [tokens of the chunk, h], summed over ranks; one rank writes it in its place."""
        place = self._to[chunk]
        if chunks.group.size == 1:
            _write_product(place.flatten(0, 1), left, right)
        else:
            summand = (left @ right).view(chunks.shards * place.shape[0], *place.shape[1:])
            self.expect(chunk, chunks.reduce(summand))

    def finish(self) -> None:
        """Write what is under way."""
        if self._pending is not None:
            chunk, pending = self._pending
            self._to[chunk] = pending.wait()
            self._pending = None


def _write_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left right, rounded to the type of the place alone."""
    if to.dtype == left.dtype:
        torch.mm(left, right, out=to)
    elif to.device.type == "cuda":
        torch.mm(left, right, out_dtype=to.dtype, out=to)
    else:
        torch.mm(left.to(to.dtype), right.to(to.dtype), out=to)


def add_product(total: Tensor | None, grad: Tensor, rows: Tensor) -> Tensor:
    """Add the weight's gradient of a chunk, grad^T rows, to the sum so far, in place; both in fp32 at least.

    Rounded once, when all chunks are in it, the sum is as exact as one product of all rows, which sums in fp32 too.
    """
    left, exact = grad.t(), torch.promote_types(rows.dtype, torch.float32)
    if rows.dtype == exact or rows.device.type != "cuda":
        left, rows = left.to(exact), rows.to(exact)
        return left @ rows if total is None else total.add_(left @ rows)
    if total is None:
        return torch.mm(left, rows, out_dtype=torch.float32)
    return torch.addmm(total, left, rows, out_dtype=torch.float32, out=total)
