import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from megatron.parallel import cross_entropy
from megatron.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.parallel.groups import Group
from tests.parallel.logical import device, logical, own, tensor_group
from tests.ranks import run_on_ranks

VOCAB = 9
LABELS_SB = torch.tensor([[0, 8], [3, 4], [4, 7], [1, 1], [5, 2]])


def loss_and_gradient(logits, labels_sb, group, vocab_size=VOCAB):
    logits = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, labels_sb, group, vocab_size)
    loss.backward(logical(5, *labels_sb.shape))
    return loss.detach(), logits.grad


def torchs_loss_and_gradient(logits, labels_sb):
    logits = logits.float().clone().requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), labels_sb.flatten(), reduction="none").view_as(labels_sb)
    loss.backward(logical(5, *labels_sb.shape))
    return loss.detach(), logits.grad


def pad(logits, columns):
    """Padding that would take over the softmax if it took part."""
    return F.pad(logits, (0, columns - logits.shape[-1]), value=50.0)


def matches_torch(padded_vocab_size):
    group = tensor_group()
    labels_sb = LABELS_SB.to(device())
    logits = 5 * logical(3, 5, 2, VOCAB)
    expected_loss, expected_grad = torchs_loss_and_gradient(logits, labels_sb)
    loss, grad = loss_and_gradient(own(pad(logits, padded_vocab_size), group, -1), labels_sb, group)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grad, own(F.pad(expected_grad, (0, padded_vocab_size - VOCAB)), group, -1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_vocab_parallel_cross_entropy_matches_torch(world_size):
    run_on_ranks(world_size, matches_torch, 12)


def test_a_rank_may_hold_nothing_but_padding():
    run_on_ranks(3, matches_torch, 24)


@pytest.mark.parametrize("padded_vocab_size", [VOCAB, 10, 64])
def test_vocabulary_padding_changes_neither_loss_nor_gradient(padded_vocab_size):
    logits = 5 * logical(3, 5, 2, VOCAB)
    expected_loss, expected_grad = torchs_loss_and_gradient(logits, LABELS_SB)
    loss, grad = loss_and_gradient(pad(logits, padded_vocab_size), LABELS_SB, Group.alone())
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grad[..., :VOCAB], expected_grad)
    assert not grad[..., VOCAB:].any()


def test_half_precision_logits_are_reduced_in_fp32():
    logits = (5 * logical(3, 5, 2, VOCAB)).bfloat16()
    expected_loss, expected_grad = torchs_loss_and_gradient(logits, LABELS_SB)
    loss, grad = loss_and_gradient(logits, LABELS_SB, Group.alone())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss)
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, expected_grad.bfloat16())


def test_huge_logits_stay_finite():
    loss, grad = loss_and_gradient(1e6 * logical(3, 5, 2, VOCAB), LABELS_SB, Group.alone())
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def test_working_in_chunks_changes_nothing(monkeypatch):
    logits = logical(3, 5, 2, VOCAB)
    whole = loss_and_gradient(logits, LABELS_SB, Group.alone())
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 3 * VOCAB + 1)
    chunked = loss_and_gradient(logits, LABELS_SB, Group.alone())
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])


def test_a_label_outside_of_the_vocabulary_affects_its_own_token_only():
    logits = logical(3, 5, 2, 12)
    right = loss_and_gradient(logits, LABELS_SB, Group.alone())
    labels_sb = LABELS_SB.clone()
    labels_sb[0, 0], labels_sb[2, 1] = -100, VOCAB + 1
    wrong = loss_and_gradient(logits, labels_sb, Group.alone())
    others = labels_sb == LABELS_SB
    assert torch.equal(right[0][others], wrong[0][others])
    assert torch.equal(right[1][others], wrong[1][others])
    assert wrong[0].isfinite().all()


def test_only_the_logits_themselves_are_kept_at_vocabulary_size():
    logits = logical(3, 5, 2, VOCAB).bfloat16().requires_grad_()
    kept = []
    with saved_tensors_hooks(kept.append, lambda nothing: nothing):
        vocab_parallel_cross_entropy(logits, LABELS_SB, Group.alone(), VOCAB)
    large = [tensor for tensor in kept if tensor.numel() > 2 * LABELS_SB.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def keeps_the_digits_of_nearly_certain_tokens():
    """The label's logit on one rank or the other, and once an equal one on both."""
    group = tensor_group()
    logits = torch.tensor([[40.0, 24.0, 0.0, 23.0], [22.0, 0.0, 1.0, 40.0], [5.0, 0.0, 0.0, 5.0]]).unsqueeze(1)
    labels_sb = torch.tensor([[0], [3], [0]])
    shard = own(logits, group, -1).clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(shard, labels_sb, group, 4)
    loss.sum().backward()
    # e^-16 + e^-17 (+ e^-40), and so on: beside 1 fp32 has one digit of them.
    others = torch.tensor([[16.0, 40.0, 17.0], [18.0, 40.0, 39.0], [5.0, 5.0, 0.0]]).double().neg().exp().sum(dim=1)
    torch.testing.assert_close(loss.detach().flatten().double(), others.log1p(), rtol=1e-6, atol=0)
    for row, column in enumerate(labels_sb.flatten().tolist()):
        if column // 2 == group.rank:
            expected = -(others[row] / (1 + others[row])).item()
            assert shard.grad[row, 0, column % 2].item() == pytest.approx(expected, rel=1e-6)


def test_a_shared_vocabulary_keeps_the_digits_of_nearly_certain_tokens():
    run_on_ranks(2, keeps_the_digits_of_nearly_certain_tokens)


def test_loss_of_a_token_that_is_nearly_certain_keeps_its_digits_whatever_the_size_of_the_logits():
    logits = torch.tensor([[[300.0, 288.0, 100.0]]], requires_grad=True)
    labels = torch.tensor([[0]])
    loss = vocab_parallel_cross_entropy(logits, labels, Group.alone(), vocab_size=3)
    exact = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten())
    torchs = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert abs(loss.item() - exact.item()) <= abs(torchs.item() - exact.item()) / 10  # 1 + exp(-12) has seven digits
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-6, atol=0, check_dtype=False)
