"""The output head's product and the cross entropy of its logits as one function, which never holds all logits.

The loss of a token needs the logits of that token alone. So the logits of a chunk of tokens are made, turned into their
loss and at once into the gradients of the head's input and weight, and overwritten by those of the next chunk (Wijmans
et al. 2024, "Cut your losses in large-vocabulary language models"; Hsu et al. 2024, "Liger kernel"). The products are
the same three as without chunks; what is saved for backward is gradients: no logits.

Legend: s sequence, b micro-batch, h hidden, v padded vocabulary, t tensor ranks, n tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.parallel.chunks import Arrivals, SequenceChunks, add_product
from megatron.parallel.cross_entropy import PlainSoftmax, ShardedSoftmax, combine_over, token_losses
from megatron.parallel.groups import Group

FP16_LIFT = 256.0
"""Factor on unit gradients in fp16. They are made before the loss scale is known; without it those of unlikely tokens,
1e-5 and less, would be rounded away. Products of them stay finite for weights up to 127."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels_sb: Tensor,
    loss_mask_sb: Tensor | None,
    *,
    group: Group,
    vocab_size: int,
    chunk_size: int,
    sequence_parallel: bool = False,
    softmax: ShardedSoftmax | None = None,
) -> Tensor:
    """Sum over tokens of loss mask x -log softmax(hidden weight^T)[label], an fp32 scalar, the same on every rank.

    Forward computes the gradients of the sum, where autograd is on; backward multiplies them by the gradient that
    arrives. The weight's are summed over the chunks in fp32 and rounded once, after that multiplication, and so are the
    input's of one rank. Those of several, which travel in the input's type, are rounded before it too.

    Args:
        hidden: [s, b, h] the same on all ranks, or this rank's shard [s/t, b, h] with sequence parallelism.
        weight: this rank's rows, [v/t, h].
        labels_sb: token ids, [s, b]; as in `vocab_parallel_cross_entropy`.
        loss_mask_sb: weight of each token's loss, [s, b]; None: all ones.
        group: the ranks that share the vocabulary.
        vocab_size: columns that are tokens; the rest is padding and takes no part.
        chunk_size: tokens whose logits exist at a time; see `tokens_at_a_time`. A chunk is made of whole positions, of
            every rank's shard with sequence parallelism, and has one at least.
        sequence_parallel: whether `hidden` is a shard of the sequence.
        softmax: computes the passes over the logits of a chunk; by default plain torch.
    """
    if softmax is None or not softmax.serves(hidden):
        softmax = PlainSoftmax()
    wants_gradients = torch.is_grad_enabled()
    if wants_gradients and weight.requires_grad:
        chunk_size = tokens_at_a_time(chunk_size, weight.shape[1], in_place=softmax.overwrites)
    job = _Job(
        chunks=SequenceChunks(group=group, size=chunk_size, sequence_parallel=sequence_parallel),
        vocab_size=vocab_size,
        softmax=softmax,
        wants_gradients=wants_gradients,
    )
    if loss_mask_sb is None:
        loss_mask_sb = torch.ones_like(labels_sb, dtype=torch.float32)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels_sb, loss_mask_sb, job)
    return loss


def tokens_at_a_time(chunk_size: int, hidden_size: int, *, in_place: bool) -> int:
    """Enlarge a chunk to what it may be at the same peak of memory, since each costs a pass over the weight's gradient.

    Backward has that gradient in fp32 and once more in the weight's type: v x h numbers beside the sum, as many as the
    logits of h tokens, where their gradient takes their place.
    """
    return max(chunk_size, hidden_size) if in_place else chunk_size


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is known before the first chunk."""

    chunks: SequenceChunks
    vocab_size: int
    softmax: ShardedSoftmax
    wants_gradients: bool

    def pick(self, of_sequence_sb: Tensor, chunk: slice) -> Tensor:
        """Take a chunk's values [n] of something that every rank has whole."""
        shards = self.chunks.shards
        return of_sequence_sb.unflatten(0, (shards, of_sequence_sb.shape[0] // shards))[:, chunk].flatten()

    def unit_gradient(self, hidden: Tensor) -> Tensor:
        """Make the place for the input's gradient, in fp32 where it does not travel."""
        dtype = torch.promote_types(hidden.dtype, torch.float32) if self.chunks.group.size == 1 else hidden.dtype
        return torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)

    def losses(self, logits_nv: Tensor, labels_n: Tensor, scale_n: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return each token's loss [n] and scale x its gradient, which may overwrite the logits; None without scale."""
        group, softmax, width = self.chunks.group, self.softmax, logits_nv.shape[1]
        first = group.rank * width
        columns, num_tokens = labels_n - first, min(max(self.vocab_size - first, 0), width)
        if group.size == 1 and scale_n is not None:
            return softmax.losses_and_gradient(logits_nv, columns, scale_n, num_tokens)
        losses, log_sum = token_losses(combine_over(group, softmax.statistics(logits_nv, columns, num_tokens)))
        if scale_n is None:
            return losses, None
        return losses, softmax.gradient(logits_nv, columns, log_sum, scale_n, num_tokens)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward does all the work; backward scales its result."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels_sb: Tensor, mask_sb: Tensor, job: _Job) -> Tensor:
        wants_hidden, wants_weight = (wanted and job.wants_gradients for wanted in ctx.needs_input_grad[:2])
        lift = FP16_LIFT if hidden.dtype == torch.float16 else 1.0
        grad_hidden = job.unit_gradient(hidden) if wants_hidden else None
        grad_weight = None
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        arrivals = None if grad_hidden is None else Arrivals(grad_hidden)
        for chunk, whole in job.chunks.gathered(hidden):
            rows, mask = whole.flatten(0, 1), job.pick(mask_sb, chunk).float()
            logits = rows @ weight.t()
            scale = mask * lift if wants_hidden or wants_weight else None
            losses, grad_logits = job.losses(logits, job.pick(labels_sb, chunk), scale)
            loss_sum += (losses * mask).sum()
            if grad_logits is None:
                continue
            if arrivals is not None:
                arrivals.expect_product(chunk, job.chunks, grad_logits, weight)
            if wants_weight:
                grad_weight = add_product(grad_weight, grad_logits, rows)
            del logits, grad_logits  # else they live while the next chunk's are made
        if arrivals is not None:
            arrivals.finish()
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.lift, ctx.dtypes, ctx.softmax = lift, (hidden.dtype, weight.dtype), job.softmax
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        unit_hidden, unit_weight = ctx.saved_tensors
        scale, rescaled = grad_loss.float() / ctx.lift, ctx.softmax.rescaled
        grad_hidden = None if unit_hidden is None else rescaled(unit_hidden, scale, ctx.dtypes[0])
        grad_weight = None if unit_weight is None else rescaled(unit_weight, scale, ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None, None
