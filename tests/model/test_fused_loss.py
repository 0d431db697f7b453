"""The fused cross entropy, handed to the loss, over a vocabulary that ranks share."""

import pytest
import torch
import torch.nn.functional as F

from megatron.kernels.cross_entropy import FusedSoftmax
from megatron.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.parallel.groups import Group
from tests.parallel.logical import logical, own, tensor_group
from tests.ranks import run_on_ranks

VOCAB = 9
LABELS_SB = torch.tensor([[0, 8], [3, 4], [4, 7], [1, 1], [5, 2]])


def loss_and_gradient(logits, group, softmax, dtype=torch.float32):
    logits = logits.to(dtype).clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, LABELS_SB, group, VOCAB, softmax)
    loss.backward(logical(5, *LABELS_SB.shape))
    return loss.detach(), logits.grad


def matches_plain(padded_vocab_size):
    group = tensor_group()
    logits = F.pad(5 * logical(3, 5, 2, VOCAB), (0, padded_vocab_size - VOCAB), value=50.0)
    shard = own(logits, group, -1)
    for dtype, resolution in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        expected = loss_and_gradient(shard, group, None, dtype)
        actual = loss_and_gradient(shard, group, FusedSoftmax(), dtype)
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1], rtol=resolution, atol=1e-6)


@pytest.mark.parametrize(("world_size", "padded_vocab_size"), [(2, 12), (3, 24)])
def test_ranks_that_share_the_vocabulary_agree_with_plain_torch(world_size, padded_vocab_size):
    run_on_ranks(world_size, matches_plain, padded_vocab_size)


def test_the_gradient_takes_the_place_of_the_logits():
    logits = logical(3, 5, 2, VOCAB).requires_grad_()
    kept = logits * 1.0
    loss = vocab_parallel_cross_entropy(kept, LABELS_SB, Group.alone(), VOCAB, FusedSoftmax())
    addresses = []
    kept.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    loss.sum().backward()
    assert addresses == [kept.data_ptr()]


def test_a_second_backward_over_the_same_logits_is_an_error():
    logits = logical(3, 5, 2, VOCAB).requires_grad_()
    loss = vocab_parallel_cross_entropy(logits * 1.0, LABELS_SB, Group.alone(), VOCAB, FusedSoftmax()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
