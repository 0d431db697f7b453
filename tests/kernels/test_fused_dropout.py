"""Bias, dropout and residual sum as one: the mask of the formula, bit for bit, wherever it is drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from megatron.kernels import dropout
from megatron.kernels.philox import drop_threshold, keep_factors, philox
from tests.kernels.fused import DEVICES, gradients, kernels_on
from tests.kernels.test_fused_pointwise import draw

TYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPE_PAIRS = [(dtype, dtype) for dtype in TYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
KEY = 0x0123456789ABCDE


def test_random_words_are_those_of_the_published_examples():
    """Of the authors' known-answer file: counter, key, result."""
    examples = [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, key, expected in examples:
        words = [[torch.tensor([int(word, 16)]) for word in text.split()] for text in (key, counter)]
        assert " ".join(f"{int(word):08x}" for word in philox(*words)) == expected


def by_formula(x, bias, residual, factors):
    """As the kernel rounds: every step in fp32, the result once more."""
    biased = x.float() if bias is None else x.float() + bias.float()
    dropped = torch.where(factors == 0, 0.0, biased * factors)
    return dropped.to(x.dtype) if residual is None else (residual.float() + dropped).to(residual.dtype)


def check_bits(device, shape, x_dtype, residual_dtype, *, biased, first=0, probability=0.3):
    x, bias = draw(shape, x_dtype, device, 1), draw(shape[-1:], x_dtype, device, 3) if biased else None
    residual = None if residual_dtype is None else draw(shape, residual_dtype, device, 2)
    leaves = [tensor.requires_grad_() for tensor in (x, bias, residual) if tensor is not None]
    key, out_dtype = torch.tensor([KEY], device=device), residual_dtype or x_dtype
    upstream = draw(shape, out_dtype, device, 4)
    factors = keep_factors(x.shape, torch.tensor([KEY]), first, drop_threshold(probability)).to(device)
    with kernels_on(device):
        out = dropout._dropout_add(x, bias, residual, key, first, probability)
        grads = torch.autograd.grad(out, leaves, upstream)
        again = torch.autograd.grad(dropout._dropout_add(x, bias, residual, key, first, probability), leaves, upstream)
    assert torch.equal(out, by_formula(x, bias, residual, factors))
    assert torch.equal(grads[0], torch.where(factors == 0, 0.0, upstream.float() * factors).to(x_dtype))
    if biased:
        terms = (upstream.double() * factors.double()).flatten(0, -2)
        assert (grads[1] - terms.sum(0)).norm() <= torch.finfo(x_dtype).eps * terms.abs().sum(0).norm()
    if residual is not None:
        assert torch.equal(grads[-1], upstream)
    assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True)), "differs between two runs"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("x_dtype", "residual_dtype"), [*TYPE_PAIRS, (torch.bfloat16, None), (torch.float32, None)])
@pytest.mark.parametrize("columns", [256, 264, 35])
@pytest.mark.parametrize("biased", [True, False])
def test_results_and_gradients_are_the_formulas_bit_for_bit(columns, biased, x_dtype, residual_dtype, device):
    check_bits(device, (20, 2, columns), x_dtype, residual_dtype, biased=biased)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [8, 12, 13, 2**33 + 24, 2**35 + 5])
def test_a_part_of_a_tensor_has_the_mask_of_its_place(first, device):
    check_bits(device, (8, 264), torch.bfloat16, torch.bfloat16, biased=True, first=first)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_no_rows_and_a_bias_gradient_of_zero(device):
    check_bits(device, (0, 264), torch.bfloat16, torch.bfloat16, biased=True)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_are_read_as_such(device):
    x, residual = draw((64, 24), device=device).t(), draw((24, 2, 64), device=device)[:, 0]
    key = torch.tensor([KEY], device=device)
    with kernels_on(device):
        found = dropout._dropout_add(x, None, residual, key, 0, 0.3)
        expected = dropout._dropout_add(x.contiguous(), None, residual.contiguous(), key, 0, 0.3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_the_mask_does_not_depend_on_the_alignment(device):
    flat = torch.ones(1 + 24 * 64, device=device, dtype=torch.bfloat16)
    key, zeros = torch.tensor([12345], device=device), torch.zeros(24, 64, device=device, dtype=torch.bfloat16)
    with kernels_on(device):
        aligned, shifted = (
            dropout._dropout_add(x.view(24, 64), None, zeros, key, 0, 0.4) for x in (flat[:-1], flat[1:])
        )
    assert torch.equal(aligned, shifted)


@given(probability=st.floats(0.01, 0.99))
@settings(max_examples=20, deadline=None)
def test_the_share_of_what_is_dropped_is_the_probability(probability):
    kept = (keep_factors(torch.Size((1 << 16,)), torch.tensor([KEY]), 0, drop_threshold(probability)) != 0).double()
    assert abs(float(kept.mean()) - (1 - probability)) < 5 * (probability * (1 - probability) / kept.numel()) ** 0.5


def test_dropped_elements_are_made_up_for_on_average():
    factors = keep_factors(torch.Size((1 << 16,)), torch.tensor([KEY]), 0, drop_threshold(0.25))
    assert factors.unique().tolist() == [0.0, pytest.approx(4 / 3)]


@pytest.mark.parametrize("device", DEVICES)
def test_masks_follow_torchs_generator(device):
    x, residual = draw((16, 64), device=device), torch.zeros(16, 64, device=device)
    with kernels_on(device):
        torch.manual_seed(1)
        first, second = (dropout.fused_dropout_add(x, residual, 0.5) for _ in range(2))
        torch.manual_seed(1)
        replayed = dropout.fused_dropout_add(x, residual, 0.5)
        everything = dropout.fused_dropout_add(x, residual, 0.0)
    assert torch.equal(first, replayed)
    assert not torch.equal(first, second)
    assert torch.equal(everything, x)


@pytest.mark.parametrize("device", DEVICES)
def test_recompute_draws_the_same_mask(device):
    x, residual = draw((16, 64), device=device), draw((16, 64), device=device, seed=1)

    def twice(x, residual):
        for _ in range(2):
            residual = dropout.fused_dropout_add(x.sin(), residual, 0.5)
        return residual

    def recomputed(x, residual):
        return checkpoint(twice, x, residual, use_reentrant=False)

    with kernels_on(device):
        torch.manual_seed(1)
        kept = gradients(twice, [x, residual], [torch.ones_like(x)])
        torch.manual_seed(1)
        again = gradients(recomputed, [x, residual], [torch.ones_like(x)])
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_in_each_replay():
    x, residual = draw((16, 64), device="cuda"), torch.zeros(16, 64, device="cuda")
    dropout.fused_dropout_add(x, residual, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dropout.fused_dropout_add(x, residual, 0.5)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(out.clone())
    assert not torch.equal(*results)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_keep_what_they_promise_torch(device):
    x, bias = draw((3, 2, 16), device=device).requires_grad_(), draw((16,), device=device).requires_grad_()
    residual, key = draw((3, 2, 16), device=device).requires_grad_(), torch.tensor([7], device=device)
    opcheck(dropout._dropout_add.overload, (x, bias, residual, key, 16, 0.5))
    opcheck(dropout._dropout_add.overload, (x, None, None, key, 0, 0.5))
