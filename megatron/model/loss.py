"""The training loss: cross entropy summed over tokens.

Legend: s sequence, b micro-batch, h hidden, v padded vocabulary, t tensor ranks.
"""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.choice import PLAIN, Kernels
from megatron.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.parallel.groups import Group
from megatron.parallel.linear_cross_entropy import linear_cross_entropy


def masked_loss(
    logits_sbv: Tensor,
    labels_bs: Tensor,
    loss_mask_bs: Tensor | None,
    *,
    vocab_size: int,
    group: Group,
    kernels: Kernels = PLAIN,
) -> Tensor:
    """Sum over the micro-batch's unmasked tokens of -log softmax(logits)[label], an fp32 scalar.

    A sum, not a mean: the mean is over the unmasked tokens of the whole step, which only the engine can count.

    Args:
        logits_sbv: [s, b, v/t], any float dtype.
        labels_bs: the token that each position should predict, [b, s].
        loss_mask_bs: weight of each token's loss, [b, s]; None: all ones.
        vocab_size: columns of the vocabulary; those after it are padding and take no part.
        group: the tensor group, over which the vocabulary is divided.
        kernels: what computes it; a fused one puts the gradient in the place of the logits.
    """
    losses_sb = vocab_parallel_cross_entropy(logits_sbv, labels_bs.t(), group, vocab_size, kernels.softmax)
    if loss_mask_bs is not None:
        losses_sb = losses_sb * loss_mask_bs.t()
    return losses_sb.sum()


def chunked_masked_loss(
    hidden: Tensor,
    weight_vh: Tensor,
    *,
    labels_bs: Tensor,
    loss_mask_bs: Tensor | None,
    vocab_size: int,
    group: Group,
    chunk_size: int,
    sequence_parallel: bool,
    kernels: Kernels = PLAIN,
) -> Tensor:
    """Compute `masked_loss` of the output head's logits, of which those of `chunk_size` tokens exist at a time.

    Args:
        hidden: what the head takes: [s, b, h], or this rank's shard [s/t, b, h] with sequence parallelism.
        weight_vh: the head's, [v/t, h].
        labels_bs: see `masked_loss`, as for `loss_mask_bs`, `vocab_size` and `group`.
        loss_mask_bs: see there.
        vocab_size: see there.
        group: see there.
        chunk_size: in tokens.
        sequence_parallel: whether `hidden` is a shard of the sequence.
        kernels: what computes the passes over the logits.
    """
    return linear_cross_entropy(
        hidden,
        weight_vh,
        labels_bs.t(),
        None if loss_mask_bs is None else loss_mask_bs.t(),
        group=group,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        softmax=kernels.softmax,
    )
