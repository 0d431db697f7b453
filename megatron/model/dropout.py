"""Dropout on hidden states, and the residual sum after it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megatron.kernels.choice import PLAIN, Kernels
from megatron.parallel.groups import Group
from megatron.parallel.random import rank_stream


class HiddenDropout(nn.Module):
    """Dropout outside of the sharded products.

    Args:
        probability: of an element to become zero.
        shards: the ranks that each hold another part of the sequence and must drop apart; a group of one when all hold
            the same hidden states and must drop alike.
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

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """Drop elements of a tensor of any shape, and add what is left to a residual stream where there is one.

        In evaluation nothing is dropped, and without a stream the tensor comes back as it is.
        """
        if self.is_idle:
            return hidden if residual is None else residual + hidden
        with rank_stream(self.shards, hidden.device):
            if residual is None:
                return F.dropout(hidden, self.probability)
            total: Tensor = self.kernels.dropout_add(hidden, residual, self.probability)
        return total
