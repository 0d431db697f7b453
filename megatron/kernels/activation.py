"""Nonlinearities of the MLP, in plain torch, with the bias of the product before them folded in.

A gated one takes [..., 2 f], the gate in the first half of the last dim and the other projection ("up") in the second,
and gives [..., f] (Shazeer 2020, "GLU variants improve transformer"); the others keep the shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Activation = Callable[..., Tensor]


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x Phi(x), exact (Hendrycks and Gimpel 2016)."""
    return F.gelu(_add(x, bias))


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the tanh approximation of `gelu` that GPT-2 was trained with."""
    return F.gelu(_add(x, bias), approximate="tanh")


def squared_relu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute max(x, 0)^2 (So et al. 2021, "Primer")."""
    return F.relu(_add(x, bias)).square()


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute silu(gate) x up."""
    gate, up = _add(x, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute gelu(gate) x up."""
    gate, up = _add(x, bias).chunk(2, dim=-1)
    return F.gelu(gate) * up


def geglu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute gelu_tanh(gate) x up."""
    gate, up = _add(x, bias).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "squared_relu": squared_relu,
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu_tanh": geglu_tanh,
}
"""By the name that `--activation-function` knows."""
