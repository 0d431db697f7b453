"""An MLP that works through the sequence a chunk at a time: what is as wide as its inside never exists for all tokens.

It keeps its input alone. Backward goes through the chunks once more, multiplies by the first weight again, and adds
what each chunk gives to the gradients of the weights, in fp32 (Bekman et al. 2025, "Arctic Long Sequence Training",
arXiv:2506.13996, call it a tiled MLP).

Legend: s sequence, b micro-batch, h hidden, f inner features, t tensor ranks. Without sequence parallelism read s for
s/t. A gated MLP has twice as many rows in its first weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.parallel.chunks import Arrivals, SequenceChunks, add_product


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The nonlinearity between the two products.

    Attributes:
        function: of the first product; with `adds_bias` of the product and the bias, which it adds.
        adds_bias: see there.
    """

    function: Callable[..., Tensor]
    adds_bias: bool = False

    def before(self, whole: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the first product, as it enters the nonlinearity."""
        return F.linear(whole, weight, None if self.adds_bias else bias)

    def __call__(self, inner: Tensor, bias: Tensor | None) -> Tensor:
        """Return what enters the second product."""
        return self.function(inner, bias) if self.adds_bias else self.function(inner)


def chunked_mlp(
    hidden: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    *,
    activation: Activation,
    chunks: SequenceChunks,
) -> Tensor:
    """Compute down(activation(up(hidden))) without the bias of `down`, which is added after the sum over the ranks.

    Args:
        hidden: [s/t, b, h].
        up_weight: this rank's rows, [f/t, h].
        up_bias: this rank's part, [f/t].
        down_weight: this rank's columns, [h, f/t].
        activation: between the products.
        chunks: how the ranks go through the sequence.

    Returns:
        [s/t, b, h].
    """
    # torch takes what a function keeps once its forward has returned, and recompute ends with the last thing taken. So
    # the work comes after: recompute of a unit that ends here does none of it, as none of it is needed.
    output: Tensor = _ChunkedMLP.apply(hidden, up_weight, up_bias, down_weight, activation, chunks)
    with torch.no_grad():
        arrivals = Arrivals(output)
        for chunk, whole in chunks.gathered(hidden):
            inner = activation(activation.before(whole, up_weight, up_bias), up_bias)
            arrivals.expect(chunk, chunks.reduce(F.linear(inner, down_weight)))
        arrivals.finish()
    return output


class _ChunkedMLP(torch.autograd.Function):
    """Forward says what backward will need, and gives a place for the result."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        activation: Activation,
        chunks: SequenceChunks,
    ) -> Tensor:
        ctx.save_for_backward(hidden, up_weight, up_bias, down_weight)
        ctx.activation, ctx.chunks = activation, chunks
        return torch.empty_like(hidden, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, up_weight, up_bias, down_weight = ctx.saved_tensors
        activation, chunks = ctx.activation, ctx.chunks
        needs_hidden, needs_up, needs_bias, needs_down, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        arrivals = Arrivals(grad_hidden)
        grad_up = grad_bias = grad_down = None
        for (chunk, whole), (_, grad_whole) in zip(chunks.gathered(hidden), chunks.gathered(grad), strict=True):
            inner = activation.before(whole, up_weight, up_bias).detach().requires_grad_()
            with torch.enable_grad():
                activated = activation(inner, up_bias)
            rows, grad_rows = whole.flatten(0, 1), grad_whole.flatten(0, 1)
            if needs_down:
                grad_down = add_product(grad_down, grad_rows, activated.detach().flatten(0, 1))
            (grad_inner,) = torch.autograd.grad(activated, inner, grad_whole @ down_weight)
            del activated, inner  # else they live while the next chunk's are made
            if needs_hidden:
                arrivals.expect(chunk, chunks.reduce(grad_inner @ up_weight))
            grad_inner = grad_inner.flatten(0, 1)
            if needs_up:
                grad_up = add_product(grad_up, grad_inner, rows)
            if needs_bias:
                summed = grad_inner.sum(dim=0, dtype=torch.promote_types(grad_inner.dtype, torch.float32))
                grad_bias = summed if grad_bias is None else grad_bias + summed
        arrivals.finish()
        grads = (grad_up, grad_bias, grad_down)
        return grad_hidden if needs_hidden else None, *(_rounded(grad, up_weight.dtype) for grad in grads), None, None


def _rounded(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if grad is None else grad.to(dtype)
