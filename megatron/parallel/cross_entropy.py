"""Cross-entropy over logits whose vocabulary is divided over the ranks of a group; the logits are never gathered.

Legend: s sequence, b micro-batch, n = s * b tokens, v padded vocabulary, t ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.parallel.collectives import reduce_from_group
from megatron.parallel.groups import Group

CHUNK_ELEMENTS = 2**25
"""Logits that are in fp32 at a time: 128 MiB at a time, enough work to hide what a launch costs."""


def vocab_parallel_cross_entropy(logits: Tensor, labels_sb: Tensor, group: Group, vocab_size: int) -> Tensor:
    """Negative log-likelihood of each label: log(sum over j < vocab_size of exp(logit_j)) - logit_label.

    Computed in fp32 whatever the dtype of the logits. Between forward and backward only the logits are kept, in their
    dtype, and one number a token: backward computes the softmax again. The fp32 temporaries hold `CHUNK_ELEMENTS`.

    Args:
        logits: this rank's columns [s, b, v/t].
        labels_sb: token ids [s, b], the same on every rank. They are not checked, since that would make the host wait
            for the device: the loss of an id outside of [0, vocab_size) is meaningless, but finite and without effect
            on other tokens, so it may stand where the loss is masked.
        group: the ranks that share the vocabulary.
        vocab_size: columns that are tokens. Those from there on, of all ranks together, are padding: they take no part
            in the softmax and their gradient is zero, so that padding changes neither loss nor gradients.

    Returns:
        fp32 [s, b], the same on every rank.
    """
    loss: Tensor = _VocabParallelCrossEntropy.apply(logits, labels_sb, group, vocab_size)
    return loss


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Forward sums over the ranks; backward needs no collective, since each rank has the gradient of its own columns.

    d loss / d logit_j = softmax_j - [j is the label].
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels_sb: Tensor, group: Group, vocab_size: int) -> Tensor:
        rows = logits.flatten(0, -2)
        first = group.rank * rows.shape[1]
        num_tokens = min(max(vocab_size - first, 0), rows.shape[1])
        columns = labels_sb.flatten() - first
        is_here = (columns >= 0) & (columns < num_tokens)
        columns = columns.masked_fill(~is_here, 0)

        highest = _highest(rows[:, :num_tokens], group)
        exp_sums = [_exp_shifted(rows[chunk, :num_tokens], highest[chunk]).sum(dim=1) for chunk in _chunks(rows)]
        label_logits = rows.gather(1, columns.unsqueeze(1)).squeeze(1).float().masked_fill(~is_here, 0.0)
        exp_sum, label_logit = reduce_from_group(torch.stack([torch.cat(exp_sums), label_logits]), group)
        log_sum = highest + exp_sum.log()

        ctx.save_for_backward(logits, columns, is_here, log_sum)
        ctx.num_tokens = num_tokens
        return (log_sum - label_logit).view_as(labels_sb)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, is_here, log_sum = ctx.saved_tensors
        rows = logits.flatten(0, -2)
        grad = torch.empty_like(rows)
        grad[:, ctx.num_tokens :] = 0.0
        if ctx.num_tokens == 0:
            return grad.view_as(logits), None, None, None
        scale = grad_loss.flatten().unsqueeze(1)
        minus_label = -is_here.float().unsqueeze(1)
        for chunk in _chunks(rows):
            softmax = _exp_shifted(rows[chunk, : ctx.num_tokens], log_sum[chunk])
            softmax.scatter_add_(1, columns[chunk].unsqueeze(1), minus_label[chunk])
            torch.mul(softmax, scale[chunk], out=grad[chunk, : ctx.num_tokens])  # casts as it writes
            del softmax  # else it lives while the next one is made
        return grad.view_as(logits), None, None, None


def _highest(rows: Tensor, group: Group) -> Tensor:
    """Largest logit of each row over all ranks, fp32 [n]: subtracted, it keeps every exponential at one or below."""
    if rows.shape[1]:
        highest = rows.amax(dim=1).float()
    else:
        highest = torch.full((rows.shape[0],), float("-inf"), device=rows.device)
    if group.size > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group.handle)
    return highest


def _exp_shifted(rows: Tensor, shift: Tensor) -> Tensor:
    """exp(rows - shift) in fp32 with a single temporary: the difference has the dtype of `shift`."""
    return (rows - shift.unsqueeze(1)).exp_()


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows that hold at most `CHUNK_ELEMENTS` elements each, and at least one row."""
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
