"""Products of a sequence whose shards travel between tensor ranks while others are multiplied.

Before a column-parallel product each rank needs the shards of all: it multiplies its own first, and those of others as
they arrive. A row-parallel product is summed over the ranks, each of which gets its shard of the sum: a rank multiplies
first what is for others, and its own while that is on its way. The idea is that of Wang et al. 2023, "Overlap
communication with dependent computation via decomposition in large deep learning models" (ASPLOS). A row of a product
does not depend on other rows, so the numbers are those of the product of the whole sequence.

Legend: s sequence, b micro-batch, t tensor ranks, n tokens of a shard, i input features, o output features. `linear.py`
has the same products with collectives before or after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.parallel.peer_copies import PeerCopies


def gathered_product(
    shard: Tensor, weight: Tensor, bias: Tensor | None, copies: PeerCopies, *, keep_gathered: bool = False
) -> Tensor:
    """Multiply the shards of all ranks by this rank's rows of a weight.

    Args:
        shard: this rank's, [s/t, b, i].
        weight: [o/t, i].
        bias: [o/t].
        copies: of the tensor group.
        keep_gathered: whether what was gathered is kept for backward, which gathers it again otherwise.

    Returns:
        [s, b, o/t].
    """
    product: Tensor = _GatheredProduct.apply(shard, weight, bias, copies, keep_gathered and torch.is_grad_enabled())
    return product


def scattered_product(input: Tensor, weight: Tensor, copies: PeerCopies) -> Tensor:
    """Multiply by this rank's columns of a weight, and sum over the ranks.

    Args:
        input: [s, b, i/t]; the ranks divide s.
        weight: [o, i/t].
        copies: of the tensor group.

    Returns:
        this rank's shard of the sum, [s/t, b, o].

    Raises:
        ValueError: they do not.
    """
    if input.shape[0] % copies.size:
        raise ValueError(f"a sequence of {input.shape[0]} positions cannot be divided over {copies.size} ranks")
    product: Tensor = _ScatteredProduct.apply(input, weight, copies)
    return product


class _GatheredProduct(torch.autograd.Function):
    """In backward the input gradient is summed over the ranks as `_ScatteredProduct` sums its output."""

    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, weight: Tensor, bias: Tensor | None, copies: PeerCopies, keeps: bool
    ) -> Tensor:
        rows = _rows(shard)
        output = rows.new_empty(copies.size * rows.shape[0], weight.shape[0])
        whole = rows.new_empty(copies.size * rows.shape[0], rows.shape[1]) if keeps else None
        for place, part in copies.gather(rows):
            if bias is None:
                torch.mm(part, weight.t(), out=output[place])
            else:
                torch.addmm(bias, part, weight.t(), out=output[place])
            if whole is not None:
                whole[place].copy_(part)
        ctx.copies, ctx.shape, ctx.gathers = copies, shard.shape, whole is None
        ctx.save_for_backward(weight, rows if whole is None else whole)
        return output.view(copies.size * shard.shape[0], *shard.shape[1:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weight, kept = ctx.saved_tensors
        copies: PeerCopies = ctx.copies
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_rows = grad.flatten(0, -2)
        arriving = copies.gather(kept) if ctx.gathers and needs_weight else None
        grad_bias = grad_rows.sum(dim=0) if needs_bias else None
        grad_weight: Tensor | None = None

        def find_weight_gradient() -> None:
            nonlocal grad_weight
            if needs_weight:
                grad_weight = grad_rows.t() @ (kept if arriving is None else _brought_together(arriving, kept, copies))

        if not needs_input:
            find_weight_gradient()
            return None, grad_weight, grad_bias, None, None
        grad_shard = grad.new_empty(grad_rows.shape[0] // copies.size, weight.shape[1])
        copies.scatter(lambda place, out: torch.mm(grad_rows[place], weight, out=out), grad_shard, find_weight_gradient)
        return grad_shard.view(ctx.shape), grad_weight, grad_bias, None, None


class _ScatteredProduct(torch.autograd.Function):
    """In backward the output's gradient is gathered as `_GatheredProduct` gathers its input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, copies: PeerCopies) -> Tensor:
        rows = input.flatten(0, -2)
        sums = rows.new_empty(rows.shape[0] // copies.size, weight.shape[0])
        copies.scatter(lambda place, out: torch.mm(rows[place], weight.t(), out=out), sums)
        ctx.copies, ctx.shape = copies, input.shape
        ctx.save_for_backward(rows, weight)
        return sums.view(input.shape[0] // copies.size, *input.shape[1:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        copies: PeerCopies = ctx.copies
        shard = _rows(grad)
        grad_rows = shard.new_empty(rows.shape[0], weight.shape[1])
        whole = shard.new_empty(rows.shape[0], weight.shape[0]) if ctx.needs_input_grad[1] else None
        for place, part in copies.gather(shard):
            torch.mm(part, weight, out=grad_rows[place])
            if whole is not None:
                whole[place].copy_(part)
        return grad_rows.view(ctx.shape), None if whole is None else whole.t() @ rows, None


def _rows(shard: Tensor) -> Tensor:
    """[s/t, b, w] as [n, w], which lie one after the other."""
    return shard.flatten(0, -2).contiguous()


def _brought_together(arriving: Iterator[tuple[slice, Tensor]], shard: Tensor, copies: PeerCopies) -> Tensor:
    whole = shard.new_empty(copies.size * shard.shape[0], shard.shape[1])
    for place, part in arriving:
        whole[place].copy_(part)
    return whole
