"""The products of `linear.py` under sequence parallelism, each overlapped with its collective.

| layer  | forward                  | backward                                                                         |
|--------|--------------------------|----------------------------------------------------------------------------------|
| column | all-gather, then product | product, then reduce-scatter; the input is gathered beside it for the weight's   |
| row    | product, then reduce-s.  | all-gather, then product; what was gathered serves the weight's gradient         |

A weight's gradient is one product of all rows: cut into pieces, it would be rounded once for each.

Legend: s sequence, b micro-batch, t ranks, i input and o output features, n = s b / t rows of a shard.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron.parallel.collectives import slice_length
from megatron.parallel.overlap import gathered_product, start_gathering, start_scattered_product
from megatron.parallel.transport import Transport

# Forward is an operator of torch's, so that recompute which keeps products sees one that it can keep, with what its
# collective brought. Operators take numbers; the transports in use are found by theirs.
_LIBRARY = torch.library.Library("megatron", "FRAGMENT")
_LIBRARY.define("gathered_linear(Tensor shard, Tensor weight, Tensor? bias, int transport) -> Tensor")
_LIBRARY.define("scattered_linear(Tensor input, Tensor weight, int transport) -> Tensor")
_TRANSPORTS: WeakValueDictionary[int, Transport] = WeakValueDictionary()


def overlapped_column_product(input: Tensor, weight: Tensor, bias: Tensor | None, transport: Transport) -> Tensor:
    """Multiply the sequence whose shards the ranks hold by this rank's rows of a weight.

    Args:
        input: this rank's shard, [s/t, b, i].
        weight: this rank's rows, [o/t, i].
        bias: this rank's part, [o/t].
        transport: among the ranks.

    Returns:
        [s, b, o/t].
    """
    output: Tensor = _ColumnProduct.apply(input, weight, bias, transport)
    return output


def overlapped_row_product(input: Tensor, weight: Tensor, transport: Transport) -> Tensor:
    """Multiply by this rank's columns of a weight, and sum over the ranks.

    Args:
        input: this rank's features, [s, b, i/t].
        weight: this rank's columns, [o, i/t].
        transport: among the ranks.

    Returns:
        this rank's shard of the sum, [s/t, b, o].

    Raises:
        ValueError: the ranks do not divide the sequence.
    """
    slice_length(input, 0, transport.group)
    output: Tensor = _RowProduct.apply(input, weight, transport)
    return output


class _ColumnProduct(torch.autograd.Function):
    """The shard is kept, and gathered again in backward: what is gathered is t times as large."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, transport: Transport) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.transport = transport
        product = torch.ops.megatron.gathered_linear(_rows(input), weight, bias, _number(transport))
        return product.view(-1, *input.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_rows = _rows(grad)
        gathering = start_gathering(_rows(input), ctx.transport) if needs_weight else None
        scattering = start_scattered_product(
            grad_rows, weight.shape[1], lambda rows, out: torch.mm(rows, weight, out=out), ctx.transport
        )
        grad_weight = None if gathering is None else grad_rows.t() @ gathering.wait()
        grad_bias = grad_rows.sum(dim=0) if needs_bias else None
        return scattering.wait().view_as(input), grad_weight, grad_bias, None


class _RowProduct(torch.autograd.Function):
    """What backward gathers for the input's gradient serves the weight's as well."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, transport: Transport) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.transport = transport
        product = torch.ops.megatron.scattered_linear(_rows(input), weight, _number(transport))
        return product.view(-1, *input.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        _, needs_weight, _ = ctx.needs_input_grad
        grad_input, whole = gathered_product(
            _rows(grad),
            weight.shape[1],
            lambda rows, out: torch.mm(rows, weight, out=out),
            ctx.transport,
            keep=needs_weight,
        )
        grad_weight = None if whole is None else whole.t() @ _rows(input)
        return grad_input.view_as(input), grad_weight, None


def _gathered_linear(shard: Tensor, weight: Tensor, bias: Tensor | None, transport: int) -> Tensor:
    columns = weight.t()

    def product(rows: Tensor, out: Tensor) -> None:
        if bias is None:
            torch.mm(rows, columns, out=out)
        else:
            torch.addmm(bias, rows, columns, out=out)

    return gathered_product(shard, weight.shape[0], product, _TRANSPORTS[transport])[0]


def _scattered_linear(input: Tensor, weight: Tensor, transport: int) -> Tensor:
    columns = weight.t()
    return start_scattered_product(
        input, weight.shape[0], lambda rows, out: torch.mm(rows, columns, out=out), _TRANSPORTS[transport]
    ).wait()


_LIBRARY.impl("gathered_linear", _gathered_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("scattered_linear", _scattered_linear, "CompositeExplicitAutograd")


@register_flop_formula([torch.ops.megatron.gathered_linear, torch.ops.megatron.scattered_linear])
def _flops_of_linear(
    input_shape: torch.Size, weight_shape: torch.Size, *rest: Any, out_shape: torch.Size, **_: Any
) -> int:
    """Count this rank's product: of all rows that come in or go out."""
    rows = max(input_shape[0], out_shape[0])
    return 2 * rows * weight_shape[0] * weight_shape[1]


def _number(transport: Transport) -> int:
    number = id(transport)
    _TRANSPORTS.setdefault(number, transport)
    return number


def _rows(tensor: Tensor) -> Tensor:
    """Flatten [s, b, f] to contiguous rows [s b, f]."""
    return tensor.flatten(0, -2).contiguous()
