"""Matrix products whose weight is spread over a group of ranks (Shoeybi et al. 2019, arXiv:1909.08053).

A column-parallel product leaves each rank with some of the output features, a row-parallel one takes them in and sums
over the ranks; between the two, every rank works on its own features without communication. With sequence parallelism
(Korthikanti et al. 2022, arXiv:2205.05198) the activations outside of such a pair are shards of the sequence.

Legend: s sequence, b micro-batch, t ranks of the group. Without sequence parallelism read s for s/t.

| layer  | weight     | input          | output         |
|--------|------------|----------------|----------------|
| column | [out/t, in] | [s/t, b, in]   | [s, b, out/t]  |
| row    | [out, in/t] | [s, b, in/t]   | [s/t, b, out]  |

The column-parallel product of queries, keys and values is in `qkv.py`; `products.py` says what multiplies. The
collective before a column-parallel product and the one after a row-parallel product can be started first and waited for
later, so that something else is computed meanwhile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.collectives import (
    Exchange,
    Gathering,
    Scattering,
    reduce_from_group,
    start_all_gather,
    start_all_reduce,
    start_gathering_sequence,
    start_reduce_scatter,
    start_scattering_sequence,
)
from megatron.parallel.gradient_sums import SumsGradients
from megatron.parallel.groups import Group
from megatron.parallel.peer_copies import PeerCopies
from megatron.parallel.products import PLAIN, Operand, Products
from megatron.parallel.shard_products import gathered_product, scattered_product
from megatron.parallel.sharding import InitKind, divide, mark_init, mark_sharded


class ColumnParallelLinear(nn.Module):
    """Product whose output features are divided over the ranks of a group.

    Parameters are empty until initialised (`mark_init`).

    Args:
        in_features: size of the last dimension of the input, whole on every rank.
        out_features: number of output features of all ranks together.
        bias: whether to add a bias, divided like the output features.
        group: the tensor group.
        init: how the weight starts.
        blocks: number of equal blocks in the output features that are divided each for itself, so that a rank's output
            is [block 0's part; block 1's part; ...]: 2 for the fused gate and up of a gated MLP.
        padding: how many output features at the end are padding, of a padded vocabulary.
        sequence_parallel: whether the input is this rank's shard of the sequence.
        keep_gathered: whether what was gathered of shards is kept for backward, which gathers them again otherwise.
        products: what multiplies; None: torch's own products.

    Raises:
        ConfigError: the ranks do not divide a block.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: Group,
        init: InitKind = "normal",
        blocks: int = 1,
        padding: int = 0,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        products: Products | None = None,
    ) -> None:
        super().__init__()
        local = blocks * divide(out_features // blocks, group, "output features")
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.keep_gathered = keep_gathered
        self.products = products or PLAIN
        self.weight = nn.Parameter(torch.empty(local, in_features))
        equal_blocks = (1,) * blocks
        mark_sharded(self.weight, 0, group, (out_features, in_features), blocks=equal_blocks, padding=padding)
        mark_init(self.weight, init)
        self.bias = nn.Parameter(torch.empty(local)) if bias else None
        if self.bias is not None:
            mark_sharded(self.bias, 0, group, (out_features,), blocks=equal_blocks, padding=padding)
            mark_init(self.bias, "zeros")

    def forward(self, input: Tensor) -> Tensor:
        """Return [s, b, out/t] for an input of [s, b, in], or [s/t, b, in] with sequence parallelism."""
        return self.product(input, self.bias)

    def gather(self, input: Tensor) -> Tensor | Gathering:
        """Start to bring together what `product` multiplies."""
        return gathered_input(input, self.group, self.products, sequence_parallel=self.sequence_parallel)

    def product(self, input: Tensor | Gathering, bias: Tensor | None = None) -> Tensor:
        """Do as `forward`, with this bias, or none for a caller that adds it later, also for what `gather` started."""
        return column_parallel_product(
            input,
            self.weight,
            bias,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            keep_gathered=self.keep_gathered,
            products=self.products,
        )


class RowParallelLinear(SumsGradients):
    """Product whose input features are divided over the ranks of a group.

    Parameters are empty until initialised (`mark_init`).

    Args:
        in_features: number of input features of all ranks together.
        out_features: size of the last dimension of the output, whole on every rank.
        bias: whether to add a bias; it is whole on every rank and added once, after the sum over the ranks.
        group: the tensor group.
        init: how the weight starts.
        sequence_parallel: whether the output is this rank's shard of the sequence.
        products: what multiplies; None: torch's own products.

    Raises:
        ConfigError: the ranks do not divide the input features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: Group,
        init: InitKind = "normal",
        sequence_parallel: bool = False,
        products: Products | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.products = products or PLAIN
        self.weight = nn.Parameter(torch.empty(out_features, divide(in_features, group, "input features")))
        mark_sharded(self.weight, 1, group, (out_features, in_features))
        mark_init(self.weight, init)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        if self.bias is not None:
            mark_init(self.bias, "zeros")

    def forward(self, input: Tensor) -> Tensor:
        """Return [s, b, out], or [s/t, b, out] with sequence parallelism, for an input of [s, b, in/t]."""
        return self.start(input).wait()

    def start(self, input: Tensor, *, with_bias: bool = True) -> RowOutput:
        """Do as `forward`, up to the start of the sum over the ranks.

        Without the bias, it is left to the caller to add `own_bias`.
        """
        if self.group.size == 1:
            bias = self.bias if with_bias else None
            return RowOutput(Scattering(linear(input, self.weight, bias, products=self.products)))
        copies = copies_of(self.group, self.products, sequence_parallel=self.sequence_parallel)
        if copies is not None:
            shard = scattered_product(input, self.weight, copies)
            return RowOutput(Scattering(shard), self.own_bias if with_bias else None)
        summand = linear(input, self.weight, products=self.products)
        if self.sequence_parallel:
            scattering = start_scattering_sequence(summand, self.group)
        else:
            scattering = Scattering(reduce_from_group(summand, self.group))
        return RowOutput(scattering, self.own_bias if with_bias else None)

    @property
    def own_bias(self) -> Tensor | None:
        """The bias as it must be read: where ranks have shards of the output, its gradient is summed over them."""
        return self.read()[0] if self.summed_parameters else self.bias

    @property
    def summed_parameters(self) -> tuple[nn.Parameter, ...]:
        """The bias, where ranks add it to shards of the output."""
        return (self.bias,) if self.bias is not None and self.sequence_parallel else ()

    @property
    def summing_group(self) -> Group:
        """The tensor group."""
        return self.group


class RowOutput(NamedTuple):
    """The output of a row-parallel product whose sum over the ranks is under way, and the bias to be added to it."""

    scattering: Scattering
    bias: Tensor | None = None

    def wait(self) -> Tensor:
        """Return [s, b, out], or [s/t, b, out] with sequence parallelism."""
        output = self.scattering.wait()
        return output if self.bias is None else output + self.bias


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, products: Products = PLAIN) -> Tensor:
    """Multiply by a weight that this rank has for itself: [..., in] to [..., out]."""
    if products is PLAIN:
        return F.linear(input, weight, bias)
    return column_parallel_product(input, weight, bias, group=Group.alone(), products=products)


def gathered_input(
    input: Tensor, group: Group, products: Products = PLAIN, *, sequence_parallel: bool
) -> Tensor | Gathering:
    """Start to gather the input of `column_parallel_product` where it is a shard of the sequence.

    Where copies carry shards it stays as it is: the product begins with it.
    """
    if not sequence_parallel or group.size == 1 or copies_of(group, products, sequence_parallel=True) is not None:
        return input
    return start_gathering_sequence(input, group)


def copies_of(group: Group, products: Products, *, sequence_parallel: bool) -> PeerCopies | None:
    """Give what carries shards to products and from them; operands other than plain matrices have collectives."""
    return group.copies if sequence_parallel and products is PLAIN else None


def column_parallel_product(
    input: Tensor | Gathering,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    sequence_parallel: bool = False,
    keep_gathered: bool = False,
    products: Products = PLAIN,
) -> Tensor:
    """Multiply by a weight whose rows are divided over the group, e.g. the tied embedding as the output head.

    Args:
        input: [s, b, in] the same on all ranks, or this rank's shard [s/t, b, in] with sequence parallelism; or what
            `gathered_input` made of it.
        weight: this rank's rows, [out/t, in].
        bias: this rank's part, [out/t].
        group: the ranks that share the rows.
        sequence_parallel: whether the input is a shard of the sequence.
        keep_gathered: whether what was gathered of shards is kept for backward, which gathers them again otherwise.
        products: what multiplies.

    Returns:
        [s, b, out/t].
    """
    if isinstance(input, Tensor):
        copies = copies_of(group, products, sequence_parallel=sequence_parallel)
        if copies is not None:
            return gathered_product(input, weight, bias, copies, keep_gathered=keep_gathered)
        input = gathered_input(input, group, products, sequence_parallel=sequence_parallel)
    keeps = torch.is_grad_enabled()
    if isinstance(input, Gathering):
        return _ColumnProduct.apply(input.shard, weight, bias, group, input.exchange, products, keeps and keep_gathered)
    if group.size == 1 and products is PLAIN:
        return F.linear(input, weight, bias)
    return _ColumnProduct.apply(input, weight, bias, group, None, products, keeps)


class _ColumnProduct(torch.autograd.Function):
    """`copy_to_group`, or the end of `start_gathering_sequence`, then the product, as one function.

    Written apart, autograd would keep the gathered input for the weight's gradient, t times the shard, and would wait
    for the collective of the input's gradient before it starts on the weight's. Here the shard is kept and gathered
    again in backward, unless there is memory for the whole, and both collectives of backward run beside a product; the
    start of the gathering waits for the shard's gradient. A whole input is kept in the form that the weight's gradient
    takes. The weight is kept as it is: its owner may put it away meanwhile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Group,
        exchange: Exchange | None,
        products: Products,
        keeps: bool,
    ) -> Tensor:
        ctx.group, ctx.exchange, ctx.products = group, exchange, products
        whole = exchange.take() if exchange else input
        operand = products.of_input(whole.flatten(0, -2), for_weight=keeps and ctx.needs_input_grad[1])
        ctx.gathers = exchange is not None and not keeps
        kept: Operand = (input,) if ctx.gathers else products.keep(operand)
        ctx.save_for_backward(weight, *kept)
        output = products.output(operand, products.of_weight(weight, for_input=False), bias)
        return output.view(*whole.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None, None]:
        weight, *kept = ctx.saved_tensors
        products: Products = ctx.products
        exchange: Exchange | None = ctx.exchange
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        gathering = start_all_gather(kept[0], ctx.group) if ctx.gathers and needs_weight else None
        operand, grad_bias = products.of_gradient(grad.flatten(0, -2), for_weight=needs_weight, sums=needs_bias)
        grad_rows = products.input_gradient(operand, products.of_weight(weight, for_output=False))
        whole = gathering.wait().flatten(0, -2) if gathering else None
        reduce = start_reduce_scatter if exchange else start_all_reduce
        reducing = reduce(grad_rows.view(*grad.shape[:-1], grad_rows.shape[-1]), ctx.group)
        grad_weight = None
        if needs_weight:
            input: Operand = tuple(kept) if whole is None else products.of_input(whole, for_output=False)
            grad_weight = products.weight_gradient(operand, input)
        grad_input = exchange.put(reducing) if exchange else reducing.wait()
        return grad_input, grad_weight, grad_bias, None, None, None, None
