"""Cross-entropy over logits whose vocabulary is divided over the ranks of a group; the logits are never gathered.

Legend: s sequence, b micro-batch, n = s * b tokens, v padded vocabulary, t ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.parallel.collectives import start_all_gather
from megatron.parallel.groups import Group

CHUNK_ELEMENTS = 2**25
"""Logits that are in fp32 at a time: 128 MiB at a time, enough work to hide what a launch costs."""


class ShardedSoftmax(Protocol):
    """The passes over one rank's columns of the logits, rows [n, v/t], that a cross entropy consists of.

    Columns from `num_tokens` on are padding. A label's column outside of 0 .. num_tokens - 1 is on another rank.
    """

    @property
    def overwrites(self) -> bool:
        """Whether gradients take the place of the logits."""

    def serves(self, rows: Tensor) -> bool:
        """Whether it can work on such logits."""

    def statistics(self, rows: Tensor, columns: Tensor, num_tokens: int) -> Tensor:
        """Return, fp32 [3, n]: the highest logit, the sum of exp(logit - highest) of the others, the label's logit.

        They are -inf and 0 of no logits, and 0 where the label is not here. The others are all but one of the highest,
        whose 1 would leave few of their digits in the sum where a token is nearly certain.
        """

    def gradient(self, rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> Tensor:
        """Return scale (exp(logit - log_sum) - [column is the label's]), zero in padding; it may overwrite `rows`.

        `log_sum` is that of `token_losses`, [2, n], scale [n].
        """

    def losses_and_gradient(
        self, rows: Tensor, columns: Tensor, scale: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Return the losses, fp32 [n], and `gradient` where this rank has the whole vocabulary."""

    def rescaled(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return factor x gradient of another type, rounded once; the factor is one fp32 number."""


def combine_over(group: Group, statistics_3n: Tensor) -> Tensor:
    """Make the `ShardedSoftmax.statistics` of all ranks' columns of those of each; every rank gets the same bits."""
    if group.size == 1:
        return statistics_3n
    highest_tn, others_tn, label_logit_tn = start_all_gather(statistics_3n.unsqueeze(0), group).wait().unbind(1)
    highest, holder = highest_tn.max(dim=0)
    share_tn = (highest_tn - highest).exp()
    # The highest logits of the other ranks are now among the others.
    others = (others_tn * share_tn + share_tn.scatter(0, holder.unsqueeze(0), 0.0)).sum(dim=0)
    return torch.stack([highest, others, label_logit_tn.sum(dim=0)])


def token_losses(statistics_3n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, and the log of its softmax's denominator in two parts that are to be added.

    The parts stay apart, highest logit and the rest [2, n]: their sum has only the digits that a large logit leaves it,
    and the loss of a token that is nearly certain would be lost in it.

    Args:
        statistics_3n: `ShardedSoftmax.statistics` of the whole vocabulary.
    """
    highest, others, label_logit = statistics_3n
    log_exp_sum = others.log1p()
    return log_exp_sum + (highest - label_logit), torch.stack([highest, log_exp_sum])


def vocab_parallel_cross_entropy(
    logits: Tensor, labels_sb: Tensor, group: Group, vocab_size: int, softmax: ShardedSoftmax | None = None
) -> Tensor:
    """Negative log-likelihood of each label: log(sum over j < vocab_size of exp(logit_j)) - logit_label.

    Computed in fp32 whatever the dtype of the logits. Between forward and backward only the logits are kept, in their
    dtype, and two numbers a token: backward computes the softmax again. The fp32 temporaries hold `CHUNK_ELEMENTS`.

    Args:
        logits: this rank's columns [s, b, v/t].
        labels_sb: token ids [s, b], the same on every rank. They are not checked, since that would make the host wait
            for the device: the loss of an id outside of [0, vocab_size) is meaningless, but finite and without effect
            on other tokens, so it may stand where the loss is masked.
        group: the ranks that share the vocabulary.
        vocab_size: columns that are tokens. Those from there on, of all ranks together, are padding: they take no part
            in the softmax and their gradient is zero, so that padding changes neither loss nor gradients.
        softmax: computes the passes over the logits; by default plain torch, in chunks. One that overwrites the logits
            with their gradient makes a second backward an error.

    Returns:
        fp32 [s, b], the same on every rank.
    """
    if softmax is None or not softmax.serves(logits):
        softmax = PlainSoftmax()
    loss: Tensor = _VocabParallelCrossEntropy.apply(logits, labels_sb, group, vocab_size, softmax)
    return loss


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Forward asks all ranks; backward needs no collective, since each rank has the gradient of its own columns.

    d loss / d logit_j = softmax_j - [j is the label].
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels_sb: Tensor, group: Group, vocab_size: int, softmax: ShardedSoftmax
    ) -> Tensor:
        rows = logits.flatten(0, -2)
        first = group.rank * rows.shape[1]
        num_tokens = min(max(vocab_size - first, 0), rows.shape[1])
        columns = labels_sb.flatten() - first

        loss, log_sum = token_losses(combine_over(group, softmax.statistics(rows, columns, num_tokens)))
        ctx.save_for_backward(logits, columns, log_sum)
        ctx.num_tokens, ctx.softmax = num_tokens, softmax
        return loss.view_as(labels_sb)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, columns, log_sum = ctx.saved_tensors
        rows = logits.flatten(0, -2)
        grad = ctx.softmax.gradient(rows, columns, log_sum, grad_loss.flatten(), ctx.num_tokens)
        return grad.view_as(logits), None, None, None, None


class PlainSoftmax:
    """`ShardedSoftmax` in plain torch, a chunk of rows at a time."""

    overwrites = False

    def serves(self, rows: Tensor) -> bool:
        """Serve everything."""
        return True

    def statistics(self, rows: Tensor, columns: Tensor, num_tokens: int) -> Tensor:
        """See `ShardedSoftmax`."""
        if num_tokens == 0:
            none = torch.zeros(rows.shape[0], device=rows.device)
            return torch.stack([none - float("inf"), none, none])
        is_here, columns = _here(columns, num_tokens)
        highest, place = rows[:, :num_tokens].max(dim=1)
        highest = highest.float()
        shift = highest.clamp(min=torch.finfo(torch.float32).min)  # a row of -inf has no share, which is not NaN
        others = [
            _exp_shifted(rows[chunk, :num_tokens], shift[chunk]).scatter_(1, place[chunk].unsqueeze(1), 0.0).sum(dim=1)
            for chunk in _chunks(rows)
        ]
        label_logits = rows.gather(1, columns.unsqueeze(1)).squeeze(1).float()
        return torch.stack([highest, torch.cat(others), label_logits.masked_fill(~is_here, 0.0)])

    def gradient(self, rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> Tensor:
        """See `ShardedSoftmax`; the logits stay as they are."""
        grad = torch.empty_like(rows)
        grad[:, num_tokens:] = 0.0
        if num_tokens == 0:
            return grad
        is_here, columns = _here(columns, num_tokens)
        place = columns.unsqueeze(1)
        label_logits = rows.gather(1, place).squeeze(1).float()
        # The label's share less 1, with the digits that the difference would lose of a token that is nearly certain.
        of_label = (label_logits - log_sum[0] - log_sum[1]).expm1()
        of_label = torch.where(is_here, of_label, of_label + 1.0).unsqueeze(1)
        for chunk in _chunks(rows):
            softmax = _exp_shifted(rows[chunk, :num_tokens], *log_sum[:, chunk])
            softmax.scatter_(1, place[chunk], of_label[chunk])
            torch.mul(softmax, scale[chunk].unsqueeze(1), out=grad[chunk, :num_tokens])  # casts as it writes
            del softmax  # else it lives while the next one is made
        return grad

    def losses_and_gradient(
        self, rows: Tensor, columns: Tensor, scale: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """See `ShardedSoftmax`."""
        losses, log_sum = token_losses(self.statistics(rows, columns, num_tokens))
        return losses, self.gradient(rows, columns, log_sum, scale, num_tokens)

    def rescaled(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """See `ShardedSoftmax`; in one pass and without an fp32 copy."""
        # A factor with a dim takes part in the choice of the type of arithmetic, where a number would be rounded first.
        return torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient, dtype=dtype))


def _here(columns: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tell which labels are among these columns, and give the others a column that can be read."""
    is_here = (columns >= 0) & (columns < num_tokens)
    return is_here, columns.masked_fill(~is_here, 0)


def _exp_shifted(rows: Tensor, shift: Tensor, further: Tensor | None = None) -> Tensor:
    """exp(rows - shift - further) in fp32 with a single temporary: the difference has the dtype of `shift`."""
    shifted = rows - shift.unsqueeze(1)
    if further is not None:
        shifted.sub_(further.unsqueeze(1))
    return shifted.exp_()


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows that hold at most `CHUNK_ELEMENTS` elements each, and at least one row."""
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
