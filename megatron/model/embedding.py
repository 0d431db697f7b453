"""The first two stages: from tokens to hidden states.

Legend: s sequence, b micro-batch, h hidden.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.model.context import Context
from megatron.model.dropout import HiddenDropout
from megatron.parallel.embedding import SequenceShardedPositions, VocabParallelEmbedding
from megatron.parallel.groups import Group


class WordEmbedding(VocabParallelEmbedding):
    """Stage 0: the vector of each token."""

    def forward(self, tokens_bs: Tensor, context: Context | None = None) -> Tensor:
        """Look up [b, s] token ids; returns [s, b, h], or [s/t, b, h] with sequence parallelism."""
        return super().forward(tokens_bs)


class Positions(nn.Module):
    """Stage 1: what is done to word vectors before the blocks.

    The scale of the embedding, where there is one; the vector of each position, where positions are learned; dropout;
    the dtype of the residual stream.
    """

    def __init__(
        self, config: ModelConfig, *, group: Group, sequence_parallel: bool = False, kernels: Kernels = PLAIN
    ) -> None:
        super().__init__()
        learned = config.position_embedding_type == "learned_absolute"
        rows = config.max_position_embeddings
        self.table = (
            SequenceShardedPositions(rows, config.hidden_size, group=group, sequence_parallel=sequence_parallel)
            if learned
            else None
        )
        self.scale = math.sqrt(config.hidden_size) if config.scale_embeddings else None
        self.fp32_residual = config.fp32_residual_connection
        shards = group.sequence_shards(sequence_parallel)
        self.dropout = HiddenDropout(config.hidden_dropout, shards=shards, kernels=kernels)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """[s, b, h] to [s, b, h]; shards [s/t, b, h] to such with sequence parallelism."""
        if self.scale is not None:
            hidden = hidden * rounded(self.scale, hidden.dtype)
        if self.fp32_residual:
            hidden = hidden.float()
        if self.table is not None:
            hidden = self.table(hidden, context.position_ids, context.offset)
        return self.dropout(hidden)


@functools.cache
def rounded(factor: float, dtype: torch.dtype) -> float:
    """Round a factor to a dtype: models whose embeddings are scaled were trained with the factor in theirs."""
    return torch.tensor(factor, dtype=dtype, device="cpu").item()
