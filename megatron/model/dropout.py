"""Dropout on hidden states, and the residual sum after it."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.kernels.choice import PLAIN, Kernels
from megatron.parallel.groups import Group
from megatron.parallel.random import rank_stream


class HiddenDropout(nn.Module):
    """Dropout outside of the sharded products.

    Args:
        probability: of an element to become zero.
        shards: the ranks that each hold another part of the sequence and must drop apart; a group of one when all hold
            the same hidden states and must drop alike. Fused, the parts of the sequence are dropped as the whole is on
            one rank.
        kernels: what computes it.
    """

    def __init__(self, probability: float, *, shards: Group, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.kernels = kernels
        self.probability = probability
        self.shards = shards

    @property
    def is_idle(self) -> bool:
        """Whether nothing is dropped: in evaluation, or with a probability of zero."""
        return not self.training or self.probability == 0.0

    @property
    def adds_bias(self) -> bool:
        """Whether it is to be given the bias of the product before it: fused, both are one pass."""
        return self.kernels.drops_by_place and not self.is_idle

    def forward(self, hidden: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Drop elements of [s, b, h], and add what is left to a residual stream where there is one.

        In evaluation nothing is dropped, and without a stream the tensor comes back as it is. A bias [h] is added
        before, where `adds_bias` says so.
        """
        if self.is_idle:
            return hidden if residual is None else residual + hidden
        drop = self.kernels.dropout_add
        if self.kernels.drops_by_place:
            before = self.shards.rank * hidden.numel()  # elements that ranks with earlier parts of the sequence hold
            total: Tensor = drop(hidden, residual, self.probability, bias, first=before)
            return total
        with rank_stream(self.shards, hidden.device):
            total = drop(hidden, residual, self.probability)
        return total
