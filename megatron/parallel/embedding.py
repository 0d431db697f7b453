"""Word embeddings with the vocabulary divided over a group of ranks, and learned positions.

Legend: s sequence, b micro-batch, h hidden, t ranks of the tensor group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.errors import ConfigError
from megatron.parallel.collectives import reduce_from_group, reduce_scatter_sequence
from megatron.parallel.groups import Group
from megatron.parallel.sharding import InitKind, divide, mark_init, mark_sharded


class VocabParallelEmbedding(nn.Module):
    """Table of word vectors, its rows divided over the ranks of a group.

    Every rank sees the same tokens, whole sequences of them, and looks up those that fall into its rows; the sum over
    the ranks completes the vectors. With sequence parallelism each rank keeps its shard of the completed sequence: the
    sum and the division are one reduce-scatter.

    Parameters are empty until initialised (`mark_init`).

    Args:
        padded_vocab_size: rows of all ranks together.
        hidden_size: h.
        vocab_size: rows that tokens use; the others are padding and start as zeros.
        group: the tensor group.
        init: how the rows start.
        sequence_parallel: whether the output is this rank's shard of the sequence.

    Raises:
        ConfigError: the ranks do not divide the padded vocabulary.
    """

    def __init__(
        self,
        padded_vocab_size: int,
        hidden_size: int,
        *,
        vocab_size: int,
        group: Group,
        init: InitKind = "normal",
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.num_rows = divide(padded_vocab_size, group, "padded vocabulary size")
        self.weight = nn.Parameter(torch.empty(self.num_rows, hidden_size))
        padding = padded_vocab_size - vocab_size
        mark_sharded(self.weight, 0, group, (padded_vocab_size, hidden_size), padding=padding)
        mark_init(self.weight, init)

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """Look up token ids [b, s]; returns [s, b, h], or [s/t, b, h] with sequence parallelism."""
        tokens_sb = tokens_bs.t()
        if self.group.size == 1:
            return F.embedding(tokens_sb, self.weight)
        collect = reduce_scatter_sequence if self.sequence_parallel else reduce_from_group
        return collect(_rows_held_here(tokens_sb, self.weight, self.group), self.group)


class SequenceShardedPositions(nn.Module):
    """Table of position vectors, its rows divided over the ranks of a group, added to the hidden states.

    Rank r owns rows [r L/t, (r + 1) L/t) of L: weight, gradient and optimizer states take 1/t of the memory.

    Each rank looks up the positions that fall into its rows and the sum over the ranks completes the vectors, as in
    `VocabParallelEmbedding`. A whole sequence of L tokens under sequence parallelism needs no communication: each
    rank's shard stands at just the positions that it owns.

    Parameters are empty until initialised (`mark_init`).

    Args:
        max_positions: L, the longest sequence.
        hidden_size: h.
        group: the tensor group.
        sequence_parallel: whether the hidden states are this rank's shard of the sequence.

    Raises:
        ConfigError: the ranks do not divide the rows. They are not padded: the logical table would then depend on t.
    """

    def __init__(self, max_positions: int, hidden_size: int, *, group: Group, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.max_positions = max_positions
        self.weight = nn.Parameter(torch.empty(divide(max_positions, group, "--max-position-embeddings"), hidden_size))
        mark_sharded(self.weight, 0, group, (max_positions, hidden_size))
        mark_init(self.weight, "normal")

    def forward(self, hidden: Tensor, position_ids_bs: Tensor | None = None, offset: int = 0) -> Tensor:
        """Add each token's position vector.

        Args:
            hidden: [s, b, h], or [s/t, b, h] with sequence parallelism.
            position_ids_bs: position of each token of the whole sequence [b, s]; counted from `offset` when None.
            offset: position of the first token, when earlier ones are in a cache.

        Raises:
            ConfigError: the sequence is longer than the table.
        """
        if position_ids_bs is not None:
            return hidden + self._look_up(position_ids_bs.t())
        length = hidden.shape[0] * (self.group.size if self.sequence_parallel else 1)
        _check_length(offset + length, self.max_positions)
        if length == self.max_positions and (self.sequence_parallel or self.group.size == 1):
            return hidden + self.weight.unsqueeze(1)
        # [s, 1]: the vectors are summed over the ranks before they are added to each sample, not after.
        positions_s1 = torch.arange(offset, offset + length, device=hidden.device).unsqueeze(1)
        return hidden + self._look_up(positions_s1)

    def _look_up(self, positions_sb: Tensor) -> Tensor:
        """Vectors of the whole sequence's positions [s, b]: [s, b, h], or this rank's [s/t, b, h] of them."""
        if self.group.size == 1:
            return F.embedding(positions_sb, self.weight)
        collect = reduce_scatter_sequence if self.sequence_parallel else reduce_from_group
        return collect(_rows_held_here(positions_sb, self.weight, self.group), self.group)


def _rows_held_here(indices: Tensor, shard: Tensor, group: Group) -> Tensor:
    """Look up indices of the whole table in this rank's shard of its rows; zeros where another rank has the row.

    An index outside of the whole table fails as in a plain lookup, on the first rank or the last, instead of being zero
    on all.
    """
    rows = indices - group.rank * shard.shape[0]
    is_elsewhere = torch.zeros_like(rows, dtype=torch.bool)
    if group.rank > 0:
        is_elsewhere |= rows < 0
    if group.rank < group.size - 1:
        is_elsewhere |= rows >= shard.shape[0]
    return F.embedding(rows.masked_fill(is_elsewhere, 0), shard).masked_fill(is_elsewhere.unsqueeze(-1), 0.0)


def _check_length(end: int, max_positions: int) -> None:
    if end > max_positions:
        raise ConfigError(
            [
                f"a sequence of {end} tokens exceeds --max-position-embeddings {max_positions}: "
                "shorten the sequence or raise the flag"
            ]
        )
