"""Dropout on hidden states."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megatron.parallel.groups import Group
from megatron.parallel.random import rank_stream


class HiddenDropout(nn.Module):
    """Dropout outside of the sharded products.

    Args:
        probability: of an element to become zero.
        shards: the ranks that each hold another part of the sequence and must drop apart; a group of one when all hold
            the same hidden states and must drop alike.
    """

    def __init__(self, probability: float, *, shards: Group) -> None:
        super().__init__()
        self.probability = probability
        self.shards = shards

    def forward(self, hidden: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape; in evaluation it comes back as it is."""
        if not self.training or self.probability == 0.0:
            return hidden
        with rank_stream(self.shards, hidden.device):
            return F.dropout(hidden, self.probability)
