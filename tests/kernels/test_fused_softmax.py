"""Softmax of attention scores, fused: as exact as plain torch, for any lengths and masks."""

import functools

import pytest
import torch
from torch.library import opcheck

from megatron.kernels import softmax
from megatron.kernels.attention.mask import causal_mask
from megatron.kernels.softmax import fused_scaled_softmax, scaled_softmax
from tests.kernels.fused import DEVICES, gradients, kernels_on, relative_error
from tests.kernels.test_fused_pointwise import draw

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_mask(batch, queries, keys, device, share=0.5):
    """Some queries may attend to nothing."""
    mask = draw((batch, 1, queries, keys), device=device, seed=8) > torch.distributions.Normal(0, 1).icdf(
        torch.tensor(share, device="cpu")
    )
    mask[:, :, ::3] = False
    return mask


def torch_softmax(scores, *, scale, causal, mask):
    """Torch's own operations in the dtype of the scores; backward reads weights of that dtype, as the kernel does."""
    allowed = causal_mask(*scores.shape[-2:], scores.device) if causal else None
    if mask is not None:
        allowed = mask if allowed is None else mask & allowed
    if allowed is None:
        return (scores * scale).softmax(dim=-1)
    return (scores * scale).masked_fill(~allowed, float("-inf")).softmax(dim=-1).masked_fill(~allowed, 0.0)


def exact_gradient(weights, grad, scale):
    weights, grad = weights.double(), grad.double()
    return scale * weights * (grad - (weights * grad).sum(dim=-1, keepdim=True))


def true_gradient(weights, grad, scale):
    """Of weights that sum to one. Less the largest one's gradient nothing cancels, which takes digits in fp64 too."""
    grad = grad.double()
    return exact_gradient(weights, grad - grad.gather(-1, weights.argmax(dim=-1, keepdim=True)), scale)


def check(device, shape, dtype, *, causal=False, masked=False, scale=0.3):
    """Weights beside fp64 and the twin; gradient beside fp64 and torch's own, and beside its formula in fp64."""
    batch, _, queries, keys = shape
    mask = random_mask(batch, queries, keys, device) if masked else None
    scores, grad = draw(shape, dtype, device, 1, 4.0), draw(shape, dtype, device, 2)
    fused, plain = (
        functools.partial(function, scale=scale, causal=causal, mask=mask)
        for function in (fused_scaled_softmax, scaled_softmax)
    )
    with kernels_on(device):
        weights, grad_scores = gradients(fused, [scores], [grad])
        again = gradients(fused, [scores], [grad])
    assert torch.equal(weights, again[0]), "differs between two runs"
    assert torch.equal(grad_scores, again[1]), "differs between two runs"
    exact, resolution = plain(scores.double()), torch.finfo(dtype).eps
    assert relative_error(weights, exact) <= 1.1 * relative_error(plain(scores), exact) + max(resolution / 20, 4e-7)
    exact_grad = true_gradient(exact, grad, scale)
    torch_grad = gradients(functools.partial(torch_softmax, scale=scale, causal=causal, mask=mask), [scores], [grad])[1]
    # Both round weights and gradients to the same type, by chance not all of them alike: of few numbers that shows.
    chance = 3 / grad.numel() ** 0.5
    allowed = (1.1 + chance) * relative_error(torch_grad, exact_grad) + max(resolution / 20, 4e-7)
    assert relative_error(grad_scores, exact_grad) <= allowed, "farther from fp64 than torch's own"
    # What the difference cancels is lost in fp32 as well: the bound is relative to its terms.
    terms = exact_gradient(weights, grad.abs(), scale).abs() + (scale * weights * grad).abs().double()
    error = (grad_scores.double() - exact_gradient(weights, grad, scale)).norm()
    # Below a type's normal numbers the distance between two of them is fixed.
    spacing = torch.finfo(dtype).smallest_normal * resolution
    assert error <= resolution * terms.norm() + spacing / 2 * grad.numel() ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [7, 40, 256, 1032])
def test_softmax_and_its_gradient_are_as_exact_as_plain_torch(keys, causal, masked, dtype, device):
    check(device, (2, 2, 3, keys), dtype, causal=causal, masked=masked)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", [2048, 16392, 20001])
def test_long_rows(keys, device):
    check(device, (1, 1, 2, keys), torch.bfloat16, causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [512, 1024, 2048, 4096, 8192, 16384])
def test_square_causal_scores(keys):
    check("cuda", (1, 2, min(keys, 2048), keys), torch.bfloat16, causal=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "margins", "allowed"),
    [
        (torch.float32, [3.0, 9.0, 15.0], 4e-6),
        (torch.bfloat16, [3.0, 9.0, 15.0], 2.0**-7),
        (torch.float16, [2.0, 4.0, 6.0], 2.0**-10),
    ],
)
@pytest.mark.parametrize("keys", [8, 37, 264, 1032, 4100])
def test_the_gradient_of_a_row_that_is_nearly_certain_keeps_its_digits(keys, dtype, margins, allowed, device):
    """Some keys a margin below one, the rest far below; the weight near 1 has lost what it differs from 1 by."""
    scores = torch.full((1, 1, len(margins), keys), -3e4, dtype=dtype, device=device)
    for row, margin in enumerate(margins):
        scores[..., row, 1:5] = 3.0 - margin
        scores[..., row, keys - 1 - row] = 3.0
    grad = draw(scores.shape, dtype, device, 2)
    with kernels_on(device):
        _, found = gradients(fused_scaled_softmax, [scores], [grad])
    exact = true_gradient(scaled_softmax(scores.double()), grad, 1.0)
    for row in range(len(margins)):
        assert relative_error(found[..., row, :], exact[..., row, :]) <= allowed


def test_the_gradient_on_a_cpu_keeps_the_digits_of_a_nearly_certain_row():
    scores, grad = torch.tensor([[[[17.0, 1.0, 0.0]]]]), torch.tensor([[[[1.5, -1.0, 0.25]]]])
    _, found = gradients(fused_scaled_softmax, [scores], [grad])
    exact = true_gradient(scaled_softmax(scores.double()), grad, 1.0)
    torch.testing.assert_close(found, exact.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", [35, 264, 1032])
def test_a_query_without_keys_gets_zeros_and_gives_no_gradient(keys, device):
    mask = torch.ones(1, 1, 3, keys, dtype=torch.bool, device=device)
    mask[:, :, 1] = False
    for function in (fused_scaled_softmax, scaled_softmax):
        with kernels_on(device):
            weights, grad = gradients(
                functools.partial(function, mask=mask),
                [draw((2, 2, 3, keys), torch.bfloat16, device, 1)],
                [draw((2, 2, 3, keys), torch.bfloat16, device, 2)],
            )
        assert not weights[:, :, 1].any()
        assert not grad[:, :, 1].any()
        torch.testing.assert_close(weights[:, :, 0].float().sum(-1), torch.ones(2, 2, device=device), rtol=0, atol=0.01)
        assert grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_more_queries_than_keys_leave_the_first_ones_without_keys(device):
    check(device, (1, 2, 24, 16), torch.bfloat16, causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_are_read_as_such(device):
    scores = draw((4, 2, 5, 64), torch.bfloat16, device).transpose(0, 1)
    mask = random_mask(1, 5, 128, device)[..., ::2]
    with kernels_on(device):
        found = fused_scaled_softmax(scores, mask=mask)
        expected = fused_scaled_softmax(scores.contiguous(), mask=mask.contiguous().expand(2, 1, 5, 64))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", [33, 264])
def test_scores_near_the_limits_of_fp16_stay_finite(keys, device):
    scores = torch.full((1, 1, 2, keys), 6e4, dtype=torch.float16, device=device)
    scores[..., ::2] = -6e4
    with kernels_on(device):
        weights = fused_scaled_softmax(scores, scale=8.0)
    torch.testing.assert_close(weights, scaled_softmax(scores, scale=8.0))


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_in_its_row(device):
    scores = draw((1, 1, 2, 264), torch.bfloat16, device)
    scores[0, 0, 1, 5] = float("nan")
    with kernels_on(device):
        weights = fused_scaled_softmax(scores)
    assert weights[0, 0, 1].isnan().all()
    assert weights[0, 0, 0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_operators_keep_what_they_promise_torch(device):
    scores = draw((2, 2, 3, 16), device=device).requires_grad_()
    opcheck(softmax._softmax.overload, (scores, random_mask(2, 3, 16, device), 0.5, True))
    opcheck(softmax._softmax.overload, (scores, None, 0.5, False))
