"""The last stage: from hidden states to logits over the padded vocabulary, or at once to the loss.

Legend: s sequence, b micro-batch, h hidden, v padded vocabulary, t tensor ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.model.context import Context
from megatron.model.embedding import WordEmbedding
from megatron.parallel.collectives import gather_dim
from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, column_parallel_product


class OutputHead(ColumnParallelLinear):
    """A head with a weight of its own."""

    def forward(self, hidden: Tensor, context: Context | None = None) -> Tensor:
        """[s, b, h], or [s/t, b, h] with sequence parallelism, to logits [s, b, v/t], or to `context.head_loss`."""
        if context is not None and context.head_loss is not None:
            return context.head_loss(hidden, self.weight)
        return super().forward(hidden)


class TiedOutputHead(nn.Module):
    """A head that reads the word embedding's weight and has no parameter.

    It takes what the embedding gives: shards of the sequence, with sequence parallelism.
    """

    def __init__(self, embedding: WordEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: a submodule would give the weight a second name

    def forward(self, hidden: Tensor, context: Context | None = None) -> Tensor:
        """[s, b, h], or [s/t, b, h] with sequence parallelism, to logits [s, b, v/t], or to `context.head_loss`."""
        (embedding,) = self._embedding
        if context is not None and context.head_loss is not None:
            return context.head_loss(hidden, embedding.weight)
        return column_parallel_product(
            hidden, embedding.weight, group=embedding.group, sequence_parallel=embedding.sequence_parallel
        )


def whole_logits(logits: Tensor, group: Group, vocab_size: int) -> Tensor:
    """Logits [..., vocab_size] of all tensor ranks, without the columns that pad the vocabulary, of [..., v/t]."""
    return gather_dim(logits, group)[..., :vocab_size]
