"""Matrices in 8 bits: the numbers that come out, the kernel against plain torch, and the three products."""

import itertools

import pytest
import torch
from torch.library import opcheck

from megatron.kernels import fp8
from megatron.kernels.fp8 import E4M3, E5M2, fused_quantise, quantise
from megatron.kernels.fp8_products import Fp8Products
from tests.kernels.fused import DEVICES, kernels_on

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
DIGITS = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Half a unit in the last place, relative to the number."""
SHAPES = [(128, 128), (1, 16), (17, 48), (300, 272), (64, 144)]


def draw(shape, seed=0, scale=1.0, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.bfloat16().to(device)


def restored(made):
    return made.by_row.float() * made.scale


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 3e-6])
def test_numbers_come_back_within_half_a_unit_of_their_last_digit(dtype, scale):
    x = draw((64, 96), scale=scale)
    error = (restored(quantise(x, dtype)) - x.float()).abs()
    normal = x.float().abs() > x.float().abs().max() * (2.0**-14 if dtype is E4M3 else 2.0**-29)
    assert (error <= DIGITS[dtype] * x.float().abs())[normal].all()
    assert normal.float().mean() > 0.99


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_scale_is_the_smallest_power_of_two_that_holds_the_largest_number(dtype):
    for largest in (1.0, 448.0, 449.0, 447.0, 57344.0, 0.875, 0.8789, 1e-20, 3e38):
        x = torch.zeros(1, 16)
        x[0, 3] = -largest
        x = x.bfloat16()
        scale = quantise(x, dtype).scale
        held = float(x.abs().max())
        assert torch.frexp(scale).mantissa.item() == 0.5
        assert held <= LARGEST[dtype] * scale.item()
        assert held > LARGEST[dtype] * scale.item() / 2


def test_a_number_has_the_same_digits_beside_a_larger_one():
    """What makes ranks with scales of their own compute with the same numbers as one rank with a single scale."""
    x = draw((32, 64))
    beside = torch.cat((x, torch.full((1, 64), 300.0).bfloat16()))
    alone, together = restored(quantise(x, E4M3)), restored(quantise(beside, E4M3))[:-1]
    held = x.float().abs() > 300 * 2.0**-14
    assert held.float().mean() > 0.95
    assert torch.equal(alone[held], together[held])


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_noticed_in_every_product(dtype, bad):
    x = draw((16, 32))
    x[3, 5] = bad
    made = quantise(x, dtype)
    assert made.scale.isnan()
    assert made.by_row.float().isnan().all()
    assert made.by_column.float()[:, :16].isnan().all()


def test_a_matrix_of_zeros_stays_one():
    made = quantise(torch.zeros(16, 16, dtype=torch.bfloat16), E4M3)
    assert torch.equal(restored(made), torch.zeros(16, 16))


def test_the_transposed_copy_is_the_same_numbers_with_zeros_behind():
    made = quantise(draw((21, 32)), E4M3)
    assert made.by_column.shape == (32, 32)
    assert torch.equal(made.by_column[:, :21].float(), made.by_row.float().t())
    assert not made.by_column[:, 21:].float().any()


# ---- the kernel


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_gives_the_bits_of_plain_torch(shape, dtype, device):
    x = draw(shape, seed=shape[0], scale=0.02, device=device)
    x[0, :8] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 9.0, -9.0, 1e-4, -1e-5])
    with kernels_on(device):
        made = fused_quantise(x, dtype, sums=True)
    expected = quantise(x, dtype, sums=True)
    assert made.scale.item() == expected.scale.item()
    assert same_bits(made.by_row, expected.by_row)
    assert same_bits(made.by_column, expected.by_column)
    torch.testing.assert_close(made.sums.float(), x.double().sum(0).float(), rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_over_more_rows_than_are_summed_at_once(device):
    x = draw((128 * 160 + 1, 16), scale=0.02, device=device)
    x[-1] = 1.0  # alone in the last of 161 tiles
    with kernels_on(device):
        sums = fused_quantise(x, E5M2, by_row=False, by_column=False, sums=True).sums
    torch.testing.assert_close(sums.float(), x.double().sum(0).float(), rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_makes_what_was_asked_for(device):
    x = draw((40, 160), device=device)
    with kernels_on(device):
        whole = fused_quantise(x, E5M2, sums=True)
        for by_row, by_column, sums in itertools.product((True, False), repeat=3):
            made = fused_quantise(x, E5M2, by_row=by_row, by_column=by_column, sums=sums)
            assert (made.by_row is not None, made.by_column is not None, made.sums is not None) == (
                by_row,
                by_column,
                sums,
            )
            assert made.scale.item() == whole.scale.item()
            assert not by_row or same_bits(made.by_row, whole.by_row)
            assert not by_column or same_bits(made.by_column, whole.by_column)
            assert not sums or same_bits(made.sums, whole.sums)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_kernel_notices_what_is_not_finite_in_every_place(bad, device):
    with kernels_on(device):
        for row, column in ((0, 0), (129, 15), (70, 7)):
            x = draw((130, 16), device=device)
            x[row, column] = bad
            made = fused_quantise(x, E4M3)
            assert made.scale.isnan()
            assert made.by_row.float().isnan().all()
            assert made.by_column.float()[:, :130].isnan().all()


@pytest.mark.gpu
def test_the_kernel_gives_the_bits_of_plain_torch_at_the_sizes_of_a_block():
    for rows, columns in ((16384, 2048), (16384, 8192), (8192, 6144), (16383, 2048)):
        x = draw((rows, columns), device="cuda")
        for dtype in LARGEST:
            made, expected = fused_quantise(x, dtype, sums=True), quantise(x, dtype, sums=True)
            again = fused_quantise(x, dtype, sums=True)
            assert same_bits(made.by_row, expected.by_row)
            assert same_bits(made.by_column, expected.by_column)
            assert same_bits(made.sums, again.sums)


def test_the_operator_keeps_what_it_promises_torch():
    for flags in ((True, True, True), (False, True, False)):
        opcheck(fp8._quantise.overload, (draw((24, 32)), 0, *flags))


# ---- the products


def operands(device, *, rows=40, inputs=64, outputs=96, scale=1.0):
    input, weight = draw((rows, inputs), 1, device=device), draw((outputs, inputs), 2, 0.02, device)
    return input, weight, draw((rows, outputs), 3, scale, device), draw((outputs,), 4, 0.01, device)


def all_products(products, input, weight, grad, bias):
    held_input, held_weight = products.of_input(input), products.of_weight(weight)
    held_grad, sums = products.of_gradient(grad, sums=True)
    return {
        "output": products.output(held_input, held_weight, bias),
        "input gradient": products.input_gradient(held_grad, held_weight),
        "weight gradient": products.weight_gradient(held_grad, products.keep(held_input)),
        "bias gradient": sums,
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
@pytest.mark.parametrize("rows", [40, 17])
def test_products_are_exact_but_for_the_rounding_of_their_operands(rows, form, device):
    """With the numbers as they were rounded the sums are those of fp32; with the numbers as they were, off by that."""
    input, weight, grad, bias = operands(device, rows=rows, scale=1e-5)
    products = Fp8Products(form)
    small_input, small_weight = restored(products.of_input(input)), restored(products.of_weight(weight))
    small_grad = restored(products.of_gradient(grad)[0])
    for rounded, (x, w, g) in (
        (True, (small_input.double(), small_weight.double(), small_grad.double())),
        (False, (input.double(), weight.double(), grad.double())),
    ):
        expected = {
            "output": x @ w.t() + bias.double(),
            "input gradient": g @ w,
            "weight gradient": g.t() @ x,
            "bias gradient": grad.double().sum(0),
        }
        for name, found in all_products(products, input, weight, grad, bias).items():
            error = (found.double() - expected[name]).norm() / expected[name].norm()
            # Errors of the operands' roundings are independent: a third of half a unit each, on average.
            digit = DIGITS[E5M2 if form == "hybrid" and "gradient" in name else E4M3]
            assert error < (4e-3 if rounded else 0.8 * digit), name
            assert rounded or name == "bias gradient" or error > 0.1 * digit, name


def test_products_repeat_in_bits_and_weights_that_stay_give_the_same():
    products, given = Fp8Products(), operands("cpu")
    once, again = all_products(products, *given), all_products(products, *given)
    with products.weights_stay():
        held = [all_products(products, *given), all_products(products, *given)]
    for name, expected in once.items():
        assert torch.equal(expected, again[name])
        assert all(torch.equal(expected, found[name]) for found in held)


def test_weights_are_brought_into_8_bits_once_while_they_stay_and_anew_afterwards():
    calls = []

    def counted(x, dtype, **wanted):
        calls.append(tuple(x.shape))
        return quantise(x, dtype, **wanted)

    products, weight = Fp8Products(quantise=counted), draw((32, 48), 1)
    with products.weights_stay():
        first = products.of_weight(weight, for_input=False)
        assert products.of_weight(weight.detach(), for_output=False) is first
    assert len(calls) == 1
    weight *= 2
    with products.weights_stay():
        assert products.of_weight(weight).scale.item() == 2 * first.scale.item()
    assert products.of_weight(weight, for_input=False).by_column is None
    assert len(calls) == 3


def test_a_weight_at_the_address_of_one_that_is_gone_is_brought_into_8_bits_for_itself():
    products = Fp8Products()
    with products.weights_stay():
        for value in (1.0, 2.0, 3.0):  # each would be made where the one before has been
            made = products.of_weight(torch.full((64, 64), value, dtype=torch.bfloat16))
            assert (made.by_row.float() * made.scale == value).all()
