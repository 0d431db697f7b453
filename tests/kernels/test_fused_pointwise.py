"""Fused activations, rotation and cross entropy, forward and backward."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from megatron.kernels import activation, cross_entropy, rotary
from megatron.kernels.activation import ACTIVATIONS, FUSED_ACTIVATIONS, GATED
from megatron.kernels.cross_entropy import FusedSoftmax
from megatron.parallel.cross_entropy import token_losses
from tests.kernels.fused import DEVICES, check_against_fp64, gradients, kernels_on, relative_error

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


# ---- activations


def check_activation(device, name, rows, columns, dtype, *, biased, scale=2.0):
    width = columns * (2 if name in GATED else 1)
    inputs = [draw((rows, 2, width), dtype, device, 1, scale)]
    if biased:
        inputs.append(draw((width,), dtype, device, 2))
    with kernels_on(device):
        grad = draw((rows, 2, columns), dtype, device, 3)
        check_against_fp64(FUSED_ACTIVATIONS[name], ACTIVATIONS[name], inputs, [grad])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_its_gradients_are_as_exact_as_plain_torch(name, biased, dtype, device):
    check_activation(device, name, 21, 264, dtype, biased=biased)
    check_activation(device, name, 5, 7, dtype, biased=biased)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_tiny_and_huge_numbers_is_finite(name, device):
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4] * 16, device=device).bfloat16()
    with kernels_on(device):
        actual, grad = gradients(
            FUSED_ACTIVATIONS[name],
            [x.view(2, 64)],
            [torch.ones(2, 64, device=device)[:, :32] if name in GATED else torch.ones(2, 64, device=device)],
        )
    expected, _ = gradients(ACTIVATIONS[name], [x.view(2, 64).double()], [torch.ones_like(actual)])
    assert grad.isfinite().all()
    torch.testing.assert_close(actual.double(), expected, rtol=8e-3, atol=1e-30)


def test_activation_operators_keep_what_they_promise_torch():
    x, bias = draw((3, 2, 16)).requires_grad_(), draw((16,)).requires_grad_()
    opcheck(activation._activation.overload, (x, bias, "gelu"))
    opcheck(activation._activation.overload, (x, None, "swiglu"))


# ---- rotation


def tables(positions, pairs, device):
    angles = torch.outer(torch.arange(positions).float(), torch.linspace(1, 0.01, pairs))
    return angles.cos().to(device), angles.sin().to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "pairs"), [(32, 16), (64, 16), (12, 3), (10, 5)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_rotation_of_strided_heads_is_as_exact_as_plain_torch(size, pairs, with_ids, interleaved, dtype, device):
    cos, sin = tables(11, pairs, device)
    ids = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0)).to(device) if with_ids else None
    heads = draw((7, 2, 5, 3, size), dtype, device)
    given = {"interleaved": interleaved, "position_ids_bs": ids}

    def call(function, x):
        return function(x[..., 1, :], cos, sin, **given)

    with kernels_on(device):
        check_against_fp64(
            functools.partial(call, rotary.fused_rotary),
            functools.partial(call, rotary.apply_rotary),
            [heads],
            [draw((7, 2, 5, size), dtype, device, 1)],
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("groups", "heads"), [(4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize(("size", "pairs", "interleaved"), [(32, 16, False), (64, 16, True), (6, 2, False)])
def test_split_of_the_product_rotates_queries_and_keys(groups, heads, size, pairs, interleaved, dtype, device):
    cos, sin = tables(9, pairs, device)
    product = draw((9, 2, groups * (heads + 2) * size), dtype, device)

    def plain(product):
        query, key, value = rotary.split_heads(product, groups, size)
        turn = functools.partial(rotary.apply_rotary, cos_pr=cos, sin_pr=sin, interleaved=interleaved)
        return turn(query), turn(key), value

    def fused(product):
        return rotary.fused_split(product, cos, sin, groups=groups, head_size=size, interleaved=interleaved)

    grads = [
        draw((2, n, 9, size), dtype, device, 1 + i).permute(2, 0, 1, 3)
        for i, n in enumerate((groups * heads, groups, groups))
    ]
    with kernels_on(device):
        check_against_fp64(fused, plain, [product], grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("groups", "heads", "size"), [(4, 1, 32), (2, 3, 64), (1, 2, 6), (2, 1, 7)])
def test_heads_are_cut_as_views_and_their_gradients_put_together(groups, heads, size, dtype, device):
    product = draw((5, 2, groups * (heads + 2) * size), dtype, device)
    upstream = [
        draw((2, n, 5, size), dtype, device, 1 + i).permute(2, 0, 1, 3)
        for i, n in enumerate((groups * heads, groups, groups))
    ]
    with kernels_on(device):
        fused = gradients(functools.partial(rotary.fused_heads, groups=groups, head_size=size), [product], upstream)
        plain = gradients(functools.partial(rotary.split_heads, groups=groups, head_size=size), [product], upstream)
        leaf = product.clone().requires_grad_()
        query, key, value = rotary.fused_heads(leaf, groups, size)
        # Several query heads of several groups are no view with one stride between the heads.
        for part in (key, value) if groups > 1 and heads > 1 else (query, key, value):
            assert part.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
        (of_value,) = torch.autograd.grad(value, leaf, upstream[2])
    assert all(torch.equal(found, expected) for found, expected in zip(fused, plain, strict=True))
    assert not rotary.split_heads(of_value, groups, size)[0].any()
    assert torch.equal(rotary.split_heads(of_value, groups, size)[2], upstream[2])


@pytest.mark.parametrize("device", DEVICES)
def test_the_inverse_rotation_undoes_a_rotation(device):
    cos, sin = tables(8, 8, device)
    x = draw((8, 2, 3, 16), device=device)
    with kernels_on(device):
        there = rotary._rotate(x, cos, sin, None, False, False)
        torch.testing.assert_close(rotary._rotate(there, cos, sin, None, False, True), x)


def test_rotation_operators_keep_what_they_promise_torch():
    cos, sin = tables(9, 8, "cpu")
    opcheck(rotary._rotate.overload, (draw((9, 2, 3, 16)).requires_grad_(), cos, sin, None, True, False))
    opcheck(rotary._split.overload, (draw((9, 2, 2 * 5 * 16)).requires_grad_(), cos, sin, None, 2, 16, False))


# ---- cross entropy


def loss_and_gradient(logits, labels, weight, num_tokens):
    softmax = FusedSoftmax()
    assert softmax.serves(logits)
    rows = logits.clone(memory_format=torch.preserve_format)
    loss, log_sum = token_losses(softmax.statistics(rows, labels, num_tokens))
    return loss, softmax.gradient(rows, labels, log_sum, weight, num_tokens)


def loss_and_gradient_at_once(logits, labels, weight, num_tokens):
    rows = logits.clone(memory_format=torch.preserve_format)
    return FusedSoftmax().losses_and_gradient(rows, labels, weight, num_tokens)


def torchs_loss_and_gradient(logits, labels, weight):
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits, labels, reduction="none")
    return loss.detach(), *torch.autograd.grad(loss, logits, weight)


def exact_loss_and_gradient(logits, labels, weight):
    """In fp64, where next to a label that is nearly certain torch's own would lose digits too."""
    logits, label = logits.double(), labels.unsqueeze(1)
    highest, place = logits.max(dim=1, keepdim=True)
    log_sum = (logits - highest).exp().scatter(1, place, 0.0).sum(dim=1, keepdim=True).log1p()
    exponents = logits - highest - log_sum
    grad = exponents.exp().scatter(1, label, exponents.expm1().gather(1, label))
    return -exponents.gather(1, label).squeeze(1), weight.double().unsqueeze(1) * grad


def check_cross_entropy(device, rows, columns, num_tokens, dtype, *, scale=5.0, stride=None, beside_torch=False):
    """Hold loss and gradient against fp64; `beside_torch`: or against torch's own in fp32, where that is farther."""
    logits = draw((rows, stride or columns), dtype, device, 1, scale)[:, :columns]
    labels = torch.randint(num_tokens, (rows,), generator=torch.Generator().manual_seed(2)).to(device)
    weight = draw((rows,), device=device, seed=3)
    expected, expected_grad = exact_loss_and_gradient(logits[:, :num_tokens], labels, weight)
    torchs, torchs_grad = torchs_loss_and_gradient(logits[:, :num_tokens].float(), labels, weight)
    of_torch = 1.1 * relative_error(torchs, expected), 1.1 * relative_error(torchs_grad, expected_grad)
    loss_slack, grad_slack = of_torch if beside_torch else (0.0, 0.0)
    resolution = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for function in (loss_and_gradient, loss_and_gradient_at_once):
        with kernels_on(device):
            loss, grad = function(logits, labels, weight, num_tokens)
            again = function(logits, labels, weight, num_tokens)
        assert torch.equal(loss, again[0])
        assert torch.equal(grad, again[1])
        assert relative_error(loss, expected) < max(2e-6, loss_slack)
        assert relative_error(grad[:, :num_tokens], expected_grad) < max(resolution, grad_slack)
        assert not grad[:, num_tokens:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("columns", "num_tokens", "stride"),
    [(640, 640, None), (640, 601, None), (37, 30, None), (999, 998, 1003), (1, 1, 1)],
)
def test_cross_entropy_and_its_gradient_are_exact(columns, num_tokens, stride, dtype, device):
    check_cross_entropy(device, 6, columns, num_tokens, dtype, stride=stride)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [loss_and_gradient, loss_and_gradient_at_once])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)])
@pytest.mark.parametrize("columns", [2, 30, 640, 4097])
def test_loss_and_gradient_of_a_token_that_is_nearly_certain_keep_their_digits(
    columns, dtype, allowed, function, device
):
    """What the others have, from 1 to 1e-14, would be lost beside 1. The label comes first, last, or is not the one."""
    margins = torch.tensor([0.0, 3.0, 8.0, 16.0, 24.0, 32.0] * 2)
    labels = torch.tensor([0] * 6 + [columns - 1] * 6)
    logits = draw((12, columns), seed=4).mul(0.5).round().div(4.0) + 256.0
    logits = (logits - margins.unsqueeze(1)).scatter(1, labels.unsqueeze(1), 256.0)
    labels[5] = columns - 1
    logits, labels, weight = logits.to(device, dtype), labels.to(device), draw((12,), device=device, seed=3)
    with kernels_on(device):
        loss, grad = function(logits, labels, weight, columns)
    exact, exact_grad = exact_loss_and_gradient(logits, labels, weight)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=allowed, atol=1e-36)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_highest_logits_share_the_probability(device):
    rows = torch.full((3, 1100), float("-inf"), device=device)
    rows[0, [3, 1099]], rows[1, 4:8], rows[2, 77] = 5.0, -7.0, 1e30
    labels, weight = torch.tensor([3, 7, 77], device=device), torch.ones(3, device=device)
    for function in (loss_and_gradient, loss_and_gradient_at_once):
        with kernels_on(device):
            loss, grad = function(rows, labels, weight, 1100)
        torch.testing.assert_close(loss.tolist(), [math.log(2), math.log(4), 0.0])
        torch.testing.assert_close(grad[0, [3, 1099]].tolist(), [-0.5, 0.5])
        torch.testing.assert_close(grad[1, 4:8].tolist(), [0.25, 0.25, 0.25, -0.75])
        assert not grad[2].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [0, 3, 4097, 16400])
def test_a_gradient_is_scaled_in_fp32_and_rounded_once(count, dtype, target, device):
    gradient = draw((count + 1,), dtype, device)
    factor = torch.tensor(2.0**-9 / 3, device=device)
    for start in (0, 1):  # aligned for vectors, and not
        given = gradient[start : count + start]
        with kernels_on(device):
            found = FusedSoftmax().rescaled(given, factor, target)
        assert torch.equal(found, (given.float() * factor).to(target))


@pytest.mark.parametrize("device", DEVICES)
def test_huge_logits_shards_of_padding_and_foreign_labels(device):
    rows = torch.tensor([[1e6, -1e6, 0.0, 3e38], [float("-inf"), 2.0, 2.0, float("-inf")]], device=device)
    labels = torch.tensor([3, -100], device=device)
    weight = torch.ones(2, device=device)
    with kernels_on(device):
        loss, grad = loss_and_gradient(rows, labels, weight, 4)
        highest, others, label_logit = FusedSoftmax().statistics(rows, labels, 0)
        nothing = FusedSoftmax().gradient(rows.clone(), labels, torch.stack([loss, loss]), weight, 0)
    assert loss[0] == 0
    assert grad.tolist() == [[0, 0, 0, 0], [0, 0.5, 0.5, 0]]
    assert label_logit.tolist() == others.tolist() == [0, 0]
    assert highest.tolist() == [float("-inf")] * 2
    assert not nothing.any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_among_the_logits_shows_in_the_loss(device):
    rows = torch.full((2, 64), float("-inf"), device=device)
    rows[0, 5], rows[1, 7] = float("nan"), 1.0
    with kernels_on(device):
        highest, others, _ = FusedSoftmax().statistics(rows, torch.zeros(2, dtype=torch.long, device=device), 64)
    assert (highest + others.log1p()).isnan().tolist() == [True, False]


def test_cross_entropy_operators_keep_what_they_promise_torch():
    rows, labels = draw((3, 12)), torch.tensor([0, 11, 3])
    opcheck(cross_entropy._statistics.overload, (rows, labels, 11))
    opcheck(cross_entropy._gradient.overload, (rows, labels, torch.ones(2, 3), torch.ones(3), 11))
    opcheck(cross_entropy._losses_and_gradient.overload, (rows, labels, torch.ones(3), 11))
    opcheck(cross_entropy._rescaled.overload, (rows, torch.tensor(0.5), torch.bfloat16))


# ---- on a GPU, through torch's dispatcher


@pytest.mark.gpu
def test_operators_on_a_gpu_keep_what_they_promise_torch():
    cos, sin = tables(9, 8, "cuda")

    def leaf(*shape):
        return draw(shape, torch.bfloat16, "cuda").requires_grad_()

    for name in ACTIVATIONS:
        opcheck(activation._activation.overload, (leaf(3, 2, 16), leaf(16), name))
    opcheck(rotary._rotate.overload, (leaf(9, 2, 3, 16), cos, sin, None, True, False))
    opcheck(rotary._split.overload, (leaf(9, 2, 2 * 5 * 16), cos, sin, None, 2, 16, False))
    rows, labels = draw((3, 12), device="cuda"), torch.tensor([0, 11, 3], device="cuda")
    ones, log_sum = torch.ones(3, device="cuda"), torch.ones(2, 3, device="cuda")
    opcheck(cross_entropy._statistics.overload, (rows, labels, 11))
    opcheck(cross_entropy._gradient.overload, (rows, labels, log_sum, ones, 11))
    opcheck(cross_entropy._losses_and_gradient.overload, (rows, labels, ones, 11))
    opcheck(cross_entropy._rescaled.overload, (rows, ones[:1], torch.bfloat16))
