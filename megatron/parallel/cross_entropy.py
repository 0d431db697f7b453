"""Cross-entropy over logits whose vocabulary is divided over the ranks of a group; the logits are never gathered.

Legend: s sequence, b micro-batch, n = s * b tokens, v padded vocabulary, t ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.parallel.collectives import reduce_from_group
from megatron.parallel.groups import Group

CHUNK_ELEMENTS = 2**25
"""Logits that are in fp32 at a time: 128 MiB at a time, enough work to hide what a launch costs."""


class ShardedSoftmax(Protocol):
    """The two passes over one rank's columns of the logits, rows [n, v/t], that a cross entropy consists of.

    Columns from `num_tokens` on are padding. A label's column outside of 0 .. num_tokens - 1 is on another rank.
    """

    def serves(self, rows: Tensor) -> bool:
        """Whether it can work on such logits."""

    def statistics(self, rows: Tensor, columns: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return, fp32 [n] each: the highest logit (-inf of none), the sum of exp(logit - highest), the label's logit.

        The last is 0 where the label is not here.
        """

    def gradient(self, rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> Tensor:
        """Return scale (exp(logit - log_sum) - [column is the label's]), zero in padding; it may overwrite `rows`.

        `log_sum` is that of `token_losses`, [2, n], scale [n].
        """


def token_losses(highest: Tensor, exp_sum: Tensor, label_logit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, and the log of its softmax's denominator in two parts that are to be added.

    The parts stay apart, highest logit and the rest [2, n]: their sum has only the digits that a large logit leaves it,
    and the loss of a token that is nearly certain would be lost in it.

    Args:
        highest: highest logit of each token, fp32 [n].
        exp_sum: sum of exp(logit - highest), fp32 [n].
        label_logit: fp32 [n].
    """
    log_exp_sum = exp_sum.log()
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
    """Forward sums over the ranks; backward needs no collective, since each rank has the gradient of its own columns.

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

        own_highest, exp_sum, label_logit = softmax.statistics(rows, columns, num_tokens)
        highest = own_highest
        if group.size > 1:
            highest = own_highest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group.handle)
            exp_sum = exp_sum * (own_highest - highest).exp()
        exp_sum, label_logit = reduce_from_group(torch.stack([exp_sum, label_logit]), group)
        loss, log_sum = token_losses(highest, exp_sum, label_logit)

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

    def serves(self, rows: Tensor) -> bool:
        """Serve everything."""
        return True

    def statistics(self, rows: Tensor, columns: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `ShardedSoftmax`."""
        if num_tokens == 0:
            none = torch.zeros(rows.shape[0], device=rows.device)
            return none - float("inf"), none, none
        is_here, columns = _here(columns, num_tokens)
        highest = rows[:, :num_tokens].amax(dim=1).float()
        shift = highest.clamp(min=torch.finfo(torch.float32).min)  # a row of -inf has no share, which is not NaN
        exp_sums = [_exp_shifted(rows[chunk, :num_tokens], shift[chunk]).sum(dim=1) for chunk in _chunks(rows)]
        label_logits = rows.gather(1, columns.unsqueeze(1)).squeeze(1).float()
        return highest, torch.cat(exp_sums), label_logits.masked_fill(~is_here, 0.0)

    def gradient(self, rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> Tensor:
        """See `ShardedSoftmax`; the logits stay as they are."""
        grad = torch.empty_like(rows)
        grad[:, num_tokens:] = 0.0
        if num_tokens == 0:
            return grad
        is_here, columns = _here(columns, num_tokens)
        minus_label = -is_here.float().unsqueeze(1)
        for chunk in _chunks(rows):
            softmax = _exp_shifted(rows[chunk, :num_tokens], *log_sum[:, chunk])
            softmax.scatter_add_(1, columns[chunk].unsqueeze(1), minus_label[chunk])
            torch.mul(softmax, scale[chunk].unsqueeze(1), out=grad[chunk, :num_tokens])  # casts as it writes
            del softmax  # else it lives while the next one is made
        return grad


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
