"""The training loss: cross entropy summed over tokens.

Legend: s sequence, b micro-batch, v padded vocabulary, t tensor ranks.
"""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.choice import PLAIN, Kernels
from megatron.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.parallel.groups import Group


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
