"""The head's product and the loss, chunk by chunk, give what the product and then the loss give."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from megatron.kernels.cross_entropy import FusedSoftmax
from megatron.parallel.cross_entropy import PlainSoftmax, vocab_parallel_cross_entropy
from megatron.parallel.groups import Group
from megatron.parallel.linear_cross_entropy import linear_cross_entropy
from tests.parallel.logical import device, logical, own, tensor_group
from tests.ranks import run_on_ranks

LENGTH, BATCH, HIDDEN, VOCAB = 6, 2, 5, 9


def labels_and_mask(length=LENGTH, batch=BATCH, vocab=VOCAB):
    labels = logical(7, length, batch).mul(1000).long().abs() % vocab
    return labels, (logical(8, length, batch) > -0.5).float()


def loss_and_gradients(hidden, weight, labels, mask, upstream=3.0, **kind):
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
    kind = {"group": Group.alone(), "vocab_size": VOCAB, "chunk_size": 4, **kind}
    loss = linear_cross_entropy(hidden, weight, labels, mask, **kind)
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


def unchunked(hidden, weight, labels, mask, upstream=3.0, vocab_size=VOCAB):
    """In the dtype of what it is given."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
    logits = (hidden @ weight.t())[..., :vocab_size]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = (losses * mask.flatten()).sum()
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(0, 9),
    batch=st.integers(1, 3),
    chunk_size=st.integers(1, 40),
    padding=st.integers(0, 4),
)
def test_loss_and_gradients_are_the_unchunked_ones(length, batch, chunk_size, padding):
    hidden, weight = logical(1, length, batch, HIDDEN), F.pad(logical(2, VOCAB, HIDDEN), (0, 0, 0, padding), value=9.0)
    labels, mask = labels_and_mask(length, batch)
    found = loss_and_gradients(hidden, weight, labels, mask, chunk_size=chunk_size)
    expected = unchunked(hidden.double(), weight.double(), labels, mask.double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float())


def sharded_is_the_whole(sequence_parallel, padded):
    group, where = tensor_group(), device()
    labels, mask = (tensor.to(where) for tensor in labels_and_mask())
    hidden, weight = logical(1, LENGTH, BATCH, HIDDEN), F.pad(logical(2, VOCAB, HIDDEN), (0, 0, 0, padded - VOCAB))
    expected = unchunked(hidden, weight, labels, mask)
    dim = 0 if sequence_parallel else None
    for chunk_size in (1, 4, 100):
        found = loss_and_gradients(
            own(hidden, group, dim),
            own(weight, group, 0),
            labels,
            mask,
            group=group,
            chunk_size=chunk_size,
            sequence_parallel=sequence_parallel,
        )
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], own(expected[1], group, dim))
        torch.testing.assert_close(found[2], own(expected[2], group, 0))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole_sequence", "sequence_shards"])
@pytest.mark.parametrize(("ranks", "padded"), [(2, 10), (3, 24)], ids=["2 ranks", "3 ranks, one of padding alone"])
def test_a_shared_vocabulary_gives_the_whole_ones(ranks, padded, sequence_parallel):
    run_on_ranks(ranks, sharded_is_the_whole, sequence_parallel, padded)


def test_without_a_mask_every_token_counts_once():
    hidden, weight, (labels, _) = logical(1, LENGTH, BATCH, HIDDEN), logical(2, VOCAB, HIDDEN), labels_and_mask()
    ones = torch.ones(LENGTH, BATCH)
    for ours, theirs in zip(
        loss_and_gradients(hidden, weight, labels, None), loss_and_gradients(hidden, weight, labels, ones), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_masked_token_with_a_label_outside_of_the_vocabulary_leaves_no_trace():
    hidden, weight = logical(1, LENGTH, BATCH, HIDDEN), logical(2, VOCAB, HIDDEN)
    labels, mask = labels_and_mask()
    foreign = torch.where(mask > 0, labels, torch.full_like(labels, -100))
    for ours, theirs in zip(
        loss_and_gradients(hidden, weight, foreign, mask),
        loss_and_gradients(hidden, weight, labels, mask),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_what_backward_keeps_is_two_gradients_however_many_tokens_there_are():
    hidden = logical(1, 64, BATCH, HIDDEN).bfloat16().requires_grad_()
    weight = logical(2, 500, HIDDEN).bfloat16().requires_grad_()
    labels, mask = labels_and_mask(64, vocab=500)
    kept = []
    with saved_tensors_hooks(kept.append, lambda nothing: nothing):
        linear_cross_entropy(hidden, weight, labels, mask, group=Group.alone(), vocab_size=500, chunk_size=8)
    found = sorted(tensor.numel() * tensor.element_size() for tensor in kept)
    assert found == sorted([hidden.numel() * 4, weight.numel() * 4])
    logits_kept_without_chunks = 64 * BATCH * 500 * 2
    assert sum(found) < logits_kept_without_chunks / 10


def test_only_a_chunk_of_logits_exists_at_a_time():
    hidden, weight = logical(1, 64, BATCH, HIDDEN).requires_grad_(), logical(2, 500, HIDDEN).requires_grad_()
    labels, mask = labels_and_mask(64, vocab=500)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (500,):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        linear_cross_entropy(hidden, weight, labels, mask, group=Group.alone(), vocab_size=500, chunk_size=8)
    assert largest == 8 * 500


@pytest.mark.parametrize(
    ("softmax", "frozen", "rows"),
    [(FusedSoftmax(), False, [5, 1]), (FusedSoftmax(), True, [2, 2, 2]), (PlainSoftmax(), False, [2, 2, 2])],
    ids=["fused", "fused, weight frozen", "plain"],
)
def test_a_chunk_has_the_hidden_size_in_tokens_where_that_does_not_raise_the_peak(softmax, frozen, rows):
    hidden, weight = logical(1, LENGTH, 1, HIDDEN).requires_grad_(), logical(2, VOCAB, HIDDEN)
    labels, found = torch.zeros(LENGTH, 1, dtype=torch.long), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "mm" in str(function) and result.shape[-1] == VOCAB:
                found.append(len(result))
            return result

    with Watch():
        linear_cross_entropy(
            hidden,
            weight.requires_grad_(not frozen),
            labels,
            None,
            group=Group.alone(),
            vocab_size=VOCAB,
            chunk_size=2,
            softmax=softmax,
        )
    assert found == rows


def test_without_autograd_no_gradient_is_computed():
    hidden, weight = logical(1, LENGTH, BATCH, HIDDEN).requires_grad_(), logical(2, VOCAB, HIDDEN).requires_grad_()
    labels, mask = labels_and_mask()
    products = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.extend([function] if "mm" in str(function) else [])
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        linear_cross_entropy(hidden, weight, labels, mask, group=Group.alone(), vocab_size=VOCAB, chunk_size=4)
    assert len(products) == LENGTH * BATCH // 4, "one product a chunk: the logits"


def check_half_precision(device, dtype, length, vocab, **kind):
    """The gradient that arrives is far from one, as after division by the tokens of a step and loss scaling."""
    upstream = 2.0**-9
    hidden, weight = logical(1, length, BATCH, 64).to(device, dtype), (0.3 * logical(2, vocab, 64)).to(device, dtype)
    labels, mask = (tensor.to(device) for tensor in labels_and_mask(length, vocab=vocab))
    exact = unchunked(hidden.double(), weight.double(), labels, mask.double(), upstream, vocab)
    found = loss_and_gradients(hidden, weight, labels, mask, upstream, vocab_size=vocab, **kind)
    again = loss_and_gradients(hidden, weight, labels, mask, upstream, vocab_size=vocab, **kind)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), "differs between two runs"
    theirs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(theirs[0] @ theirs[1].t(), labels, Group.alone(), vocab)
    ((losses * mask).sum() * upstream).backward()
    torch.testing.assert_close(found[0], exact[0].float(), rtol=1e-3, atol=0)
    for ours, plain, right in zip(found[1:], (theirs[0].grad, theirs[1].grad), exact[1:], strict=True):
        error, plain_error = (((value.double() - right).norm() / right.norm()).item() for value in (ours, plain))
        assert error < 1.25 * plain_error, (error, plain_error)


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALF
def test_half_precision_is_as_close_to_fp64_as_the_unchunked_loss(dtype):
    check_half_precision("cpu", dtype, 128, 300, chunk_size=16)


@pytest.mark.gpu
@HALF
@pytest.mark.parametrize("softmax", [None, FusedSoftmax()], ids=["plain", "fused"])
@pytest.mark.parametrize("vocab", [1000, 1003])
def test_half_precision_on_a_gpu_is_as_close(dtype, softmax, vocab):
    check_half_precision("cuda", dtype, 700, vocab, chunk_size=256, softmax=softmax)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_one_rank_the_gradient_of_the_input_is_rounded_once(where):
    """Not before it is multiplied by the gradient that arrives, which is no power of two here, and again after it."""
    hidden, weight = (logical(*shape).to(where, torch.bfloat16) for shape in ((1, 64, BATCH, 64), (2, 300, 64)))
    labels, mask = (tensor.to(where) for tensor in labels_and_mask(64, vocab=300))
    logits = hidden.flatten(0, 1) @ weight.t()
    _, of_logits = PlainSoftmax().losses_and_gradient(logits, labels.flatten(), mask.flatten(), 300)
    exact, terms = (
        1.37 * (left.double() @ right.double())
        for left, right in ((of_logits, weight), (of_logits.abs(), weight.abs()))
    )
    _, found, _ = loss_and_gradients(hidden, weight, labels, mask, 1.37, vocab_size=300, chunk_size=1000)
    error = (found.flatten(0, 1).double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + 1e-6 * terms).all(), "a rounding to bf16 and those of sums in fp32"


@pytest.mark.gpu
def test_chunks_take_a_fraction_of_the_memory():
    hidden = logical(1, 8192, 1, 256).to("cuda", torch.bfloat16).requires_grad_()
    weight = logical(2, 32768, 256).to("cuda", torch.bfloat16).requires_grad_()
    labels = torch.zeros(8192, 1, dtype=torch.long, device="cuda")
    kind = {"group": Group.alone(), "vocab_size": 32768, "softmax": FusedSoftmax()}

    def peak(chunk_size):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(
            linear_cross_entropy(hidden, weight, labels, None, chunk_size=chunk_size, **kind), (hidden, weight)
        )
        return torch.cuda.max_memory_allocated() - before

    peak(512)  # the libraries' own memory comes with the first call
    logits = 2 * 32768
    assert peak(8192) - peak(512) > 0.9 * (8192 - 512) * logits


def test_fp16_keeps_the_gradients_of_unlikely_tokens():
    """A token of probability 1e-8, at a loss scale that makes its gradient representable."""
    hidden = torch.ones(1, 1, 1, dtype=torch.float16)
    weight = torch.tensor([[18.4], [0.0]], dtype=torch.float16)
    labels = torch.zeros(1, 1, dtype=torch.long)
    _, _, grad = loss_and_gradients(hidden, weight, labels, None, 2.0**16, vocab_size=2)
    expected = 2.0**16 * torch.exp(torch.tensor(-18.4)).item()
    assert grad[1].item() == pytest.approx(expected, rel=0.01)


def test_an_infinite_gradient_arrives_as_such_in_fp16():
    """The loss scaler must see that its scale is too high."""
    hidden, weight = logical(1, LENGTH, BATCH, HIDDEN).half(), logical(2, VOCAB, HIDDEN).half()
    _, grad_hidden, grad_weight = loss_and_gradients(hidden, weight, *labels_and_mask(), 2.0**24)
    assert grad_hidden.isinf().any()
    assert grad_weight.isinf().any()
