"""How the gradients of micro-batches are added up in fp32 where DeepSpeed keeps such sums of bf16 gradients."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

SMALL = 2**16
"""Numbers of a gradient, at most, whose addition takes a GPU no longer than a launch takes the host."""


def sum_in_one_pass(optimizer: Any) -> None:
    """Let DeepSpeed's bf16 optimizer add each gradient to its fp32 sum in one pass; others are left as they are.

    Its own way casts the gradient first, adds the cast, and keeps the gradient to be zeroed, so that the next one is
    added to zeros: 30 bytes a parameter and micro-batch where 10 do. The sums are the same bits.
    """
    if isinstance(optimizer, BF16_Optimizer) and not optimizer.immediate_grad_update:
        optimizer.update_hp_grads = _Sums(optimizer)


class _Sums:
    """Adds gradients as `BF16_Optimizer.update_hp_grads` does.

    torch adds many tensors at a time, but of one dtype, so that small gradients are cast first, into memory that is
    kept: of a block those of norms and biases, most of its gradients and hardly any of its numbers.
    """

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self._has_sums: list[list[bool]] = optimizer.fp32_groups_has_gradients
        self._weights: list[list[tuple[Tensor, Tensor, Tensor | None]]] = []
        """Of each group the weights, their sums, and room for the casts of small gradients."""
        for weights, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for weight, total in zip(weights, sums, strict=True):
                weight._hp_grad = total  # where DeepSpeed looks for it
            totals = [total.view_as(weight) for weight, total in zip(weights, sums, strict=True)]
            rooms = [torch.empty_like(total) if total.numel() <= SMALL else None for total in totals]
            self._weights.append(list(zip(weights, totals, rooms, strict=True)))

    @torch.no_grad()
    def __call__(self, clear_lp_grads: bool = False) -> None:
        """Add; the gradients are freed whatever `clear_lp_grads` says."""
        del clear_lp_grads
        first, large, small, casts = _Pairs(), _Pairs(), _Pairs(), _Pairs()
        for weights, has_sums in zip(self._weights, self._has_sums, strict=True):
            for place, (weight, total, room) in enumerate(weights):
                gradient, weight.grad = weight.grad, None
                if gradient is None:
                    continue
                if not has_sums[place]:  # it holds zeros
                    first.take(total, gradient)
                    has_sums[place] = True
                elif room is None:
                    large.take(total, gradient)
                else:
                    casts.take(room, gradient)
                    small.take(total, room)
        for pairs, operation in (
            (first, torch._foreach_copy_),
            (large, torch._foreach_add_),
            (casts, torch._foreach_copy_),
            (small, torch._foreach_add_),
        ):
            if pairs.targets:
                operation(pairs.targets, pairs.sources)


class _Pairs:
    """Tensors to be written, and those that they are written from."""

    def __init__(self) -> None:
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []

    def take(self, target: Tensor, source: Tensor) -> None:
        """Add a pair."""
        self.targets.append(target)
        self.sources.append(source)
