"""The three products of a linear layer: what a layer multiplies with is handed in.

Legend: n rows (tokens), i input features, o output features. The weight is [o, i].

| product         | of                | sums over |
|-----------------|-------------------|-----------|
| output          | input, weight     | i         |
| input gradient  | gradient, weight  | o         |
| weight gradient | gradient, input   | n         |

Each tensor takes part in two of them, and is first brought into the form in which it is multiplied, an operand: for
`PLAIN` the tensor itself. Operands are what a layer hands on and keeps; nobody else looks into them.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

Operand = tuple[Tensor | None, ...]


class Products(Protocol):
    """Makes operands of matrices and multiplies them. Nothing of it is differentiated."""

    def of_input(self, input: Tensor, *, for_output: bool = True, for_weight: bool = True) -> Operand:
        """Make an operand of [n, i] for the products that are named."""
        ...

    def of_weight(self, weight: Tensor, *, for_output: bool = True, for_input: bool = True) -> Operand:
        """Make an operand of [o, i] for the products that are named."""
        ...

    def of_gradient(
        self, grad: Tensor, *, for_weight: bool = True, sums: bool = False
    ) -> tuple[Operand, Tensor | None]:
        """Make an operand of [n, o] for both products, or the first; with `sums` also the bias's gradient, [o]."""
        ...

    def keep(self, input: Operand) -> Operand:
        """Leave of an input's operand what the weight's gradient takes."""
        ...

    def output(self, input: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        """[n, o]."""
        ...

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        """[n, i]."""
        ...

    def weight_gradient(self, grad: Operand, input: Operand) -> Tensor:
        """[o, i]."""
        ...


class _Plain:
    """torch's own products in the dtype of the tensors."""

    def of_input(self, input: Tensor, *, for_output: bool = True, for_weight: bool = True) -> Operand:
        return (input,)

    def of_weight(self, weight: Tensor, *, for_output: bool = True, for_input: bool = True) -> Operand:
        return (weight,)

    def of_gradient(
        self, grad: Tensor, *, for_weight: bool = True, sums: bool = False
    ) -> tuple[Operand, Tensor | None]:
        return (grad,), grad.sum(dim=0) if sums else None

    def keep(self, input: Operand) -> Operand:
        return input

    def output(self, input: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        return F.linear(_whole(input), _whole(weight), bias)

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        return _whole(grad) @ _whole(weight)

    def weight_gradient(self, grad: Operand, input: Operand) -> Tensor:
        return _whole(grad).t() @ _whole(input)


def _whole(operand: Operand) -> Tensor:
    (tensor,) = operand
    if tensor is None:
        raise ValueError("an operand of plain products is a tensor")
    return tensor


PLAIN: Products = _Plain()
