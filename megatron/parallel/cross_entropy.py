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

from megatron.parallel.collectives import start_all_reduce
from megatron.parallel.groups import Group

CHUNK_ELEMENTS = 2**25
"""Logits that are in fp32 at a time: 128 MiB for each temporary, enough work to hide what a launch costs."""


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
    """Gradient of a logit: (softmax - [it is the label's]) * gradient of the token's loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels_sb: Tensor, group: Group, vocab_size: int) -> Tensor:
        rows = logits.flatten(0, -2)
        first = group.rank * rows.shape[1]
        num_tokens = min(max(vocab_size - first, 0), rows.shape[1])
        columns = labels_sb.flatten() - first
        is_here = (columns >= 0) & (columns < num_tokens)
        columns = columns.masked_fill(~is_here, 0)

        log_sums = [torch.logsumexp(rows[chunk, :num_tokens].float(), dim=1) for chunk in _chunks(rows)]
        label_logits = rows.gather(1, columns.unsqueeze(1)).squeeze(1).float().masked_fill(~is_here, 0.0)
        log_sum, label_logit = _combine(torch.cat(log_sums), label_logits, group)

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
        scale = grad_loss.flatten().unsqueeze(1)
        minus_label = -is_here.float().unsqueeze(1)
        for chunk in _chunks(rows):
            # The difference is fp32, since log_sum is.
            part = (rows[chunk, : ctx.num_tokens] - log_sum[chunk].unsqueeze(1)).exp_()
            if ctx.num_tokens:
                part.scatter_add_(1, columns[chunk].unsqueeze(1), minus_label[chunk])
            grad[chunk, : ctx.num_tokens] = part.mul_(scale[chunk])
        return grad.view_as(logits), None, None, None


def _combine(log_sum: Tensor, label_logit: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Turn log-sums and label logits [n] over each rank's columns into those over all columns."""
    if group.size == 1:
        return log_sum, label_logit
    highest = log_sum.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group.handle)
    # exp(log_sum - highest) is at most one, and zero on a rank that has padding only: there log_sum is -inf.
    sums, label_logit = start_all_reduce(torch.stack([(log_sum - highest).exp(), label_logit]), group).wait()
    return highest + sums.log(), label_logit


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows that hold at most `CHUNK_ELEMENTS` elements each, and at least one row."""
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
