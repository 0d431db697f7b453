"""The fused norm, forward and backward, with and without the residual sum."""

import functools

import pytest
import torch
from torch.library import opcheck

from megatron.kernels import norm
from tests.kernels.fused import DEVICES, check_against_fp64, gradients, kernels_on

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


def draw(shape, dtype, device, seed, scale=1.0, shift=0.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (scale * values + shift).to(device, dtype)


def check(device, rows, columns, x_dtype, w_dtype, *, centred, added, offset=0.0, biased=True):
    x, delta = draw((rows, 1, columns), x_dtype, device, 1, 2.0, 0.5), draw((rows, 1, columns), w_dtype, device, 2)
    weight, bias = draw((columns,), w_dtype, device, 3, 0.3, 1 - offset), draw((columns,), w_dtype, device, 4, 0.3)
    inputs = [x, delta, weight] if added else [x, weight]
    if centred and biased:
        inputs.append(bias)
    grads = [draw((rows, 1, columns), torch.float32, device, 5 + i) for i in range(1 + added)]
    given = {"epsilon": 1e-5, "weight_offset": offset, "centred": centred}

    def call(function, *tensors):
        return function(*tensors, *([None] if not (centred and biased) else []), **given)

    def in_fp32_where_mixed(function, *tensors):
        """Plain torch has no norm of an fp32 stream with half weights that fp64 inputs could pass through."""
        return call(function, *tensors)

    fused, plain = (norm.fused_add_norm, norm.add_norm) if added else (norm.fused_norm, norm.norm)
    with kernels_on(device):
        check_against_fp64(functools.partial(call, fused), functools.partial(in_fp32_where_mixed, plain), inputs, grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPES)
@pytest.mark.parametrize("columns", [8, 36, 264, 600])
def test_norm_and_its_gradients_are_as_exact_as_plain_torch(device, columns, x_dtype, w_dtype, centred, added):
    check(device, 7, columns, x_dtype, w_dtype, centred=centred, added=added)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 3, 31, 2048, 6143, 8200, 16384])
def test_rows_of_any_length_to_16k(device, columns):
    rows = 1 if columns > 4096 and device == "cpu" else 3
    check(device, rows, columns, torch.bfloat16, torch.bfloat16, centred=True, added=True)
    if rows > 1:
        check(device, rows, columns, torch.float32, torch.float32, centred=False, added=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("columns", [4096, 8208])
def test_blocks_of_backward_take_many_rows_in_turn(columns, centred, device):
    rows = 3000 if device == "cuda" else 32 if columns == 4096 else 13  # an emulated GPU has three multiprocessors
    check(device, rows, columns, torch.bfloat16, torch.bfloat16, centred=centred, added=centred)


@pytest.mark.parametrize(("columns", "shared_kib"), [(264, 64), (8208, 80)])
def test_a_gpu_with_less_shared_memory_keeps_fewer_rows_on_their_way(columns, shared_kib, monkeypatch):
    monkeypatch.setenv("EMULATED_SHARED_BYTES", str(shared_kib * 1024))
    check("cpu", 9, columns, torch.bfloat16, torch.bfloat16, centred=True, added=True)


def test_a_gpu_with_too_little_shared_memory_is_told_the_way_out(monkeypatch):
    monkeypatch.setenv("EMULATED_SHARED_BYTES", str(48 * 1024))
    with pytest.raises(ValueError, match="over 16384 columns: run with --no-norm-fusion"):
        check("cpu", 1, 16384, torch.bfloat16, torch.bfloat16, centred=True, added=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_handed_on_by_its_norm_adds_both_gradients(device, dtype):
    inputs = [draw((6, 2, 64), dtype, device, 1), draw((64,), dtype, device, 2), draw((64,), dtype, device, 3)]
    grads = [draw((6, 2, 64), dtype, device, 4), draw((6, 2, 64), dtype, device, 5)]
    with kernels_on(device):
        check_against_fp64(
            functools.partial(norm.fused_stream_norm, epsilon=1e-5),
            functools.partial(norm.stream_norm, epsilon=1e-5),
            inputs,
            grads,
        )
        x = inputs[0].clone().requires_grad_()
        stream, normed = norm.fused_stream_norm(x, *inputs[1:], 1e-5)
        assert stream.data_ptr() == x.data_ptr()
        assert torch.equal(torch.autograd.grad(stream.sum(), x, retain_graph=True)[0], torch.ones_like(x))
        (alone,) = torch.autograd.grad(normed, x, grads[1])
        y = inputs[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(norm.fused_norm(y, *inputs[1:], 1e-5), y, grads[1])
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_stored_minus_one_and_norms_without_a_bias(device):
    check(device, 5, 64, torch.float32, torch.float32, centred=True, added=True, offset=1.0, biased=False)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_no_rows_and_zero_gradients(device):
    x = torch.empty(0, 2, 64, device=device, requires_grad=True)
    weight, bias = (torch.ones(64, device=device, requires_grad=True) for _ in range(2))
    with kernels_on(device):
        normed = norm.fused_norm(x, weight, bias, 1e-5)
        normed.sum().backward()
    assert normed.shape == x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_strided_rows_and_a_large_mean(device):
    x = (1000 + torch.randn(6, 4, 2, 64, generator=torch.Generator().manual_seed(0))).to(device)[:, :, 1]
    weight = torch.ones(64, device=device)
    with kernels_on(device):
        check_against_fp64(
            lambda x, w: norm.fused_norm(x, w, None, 1e-5), lambda x, w: norm.norm(x, w, None, 1e-5), [x, weight], [x]
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", [0, 100])
def test_one_huge_element_does_not_spoil_the_variance_of_its_row(place, device):
    x = draw((4, 2048), torch.float32, device, 1)
    x[:, place] = 1e4
    weight = torch.ones(2048, device=device)
    grad = draw((4, 2048), torch.float32, device, 2)  # that of x itself would leave nothing but rounding
    with kernels_on(device):
        check_against_fp64(
            lambda x, w: norm.fused_norm(x, w, None, 1e-5),
            lambda x, w: norm.norm(x, w, None, 1e-5),
            [x, weight],
            [grad],
        )


def test_operators_keep_what_they_promise_torch():
    x, delta = torch.randn(3, 2, 16, requires_grad=True), torch.randn(3, 2, 16)
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    opcheck(norm._norm.overload, (x, weight, bias, 1e-5, 0.0, True))
    opcheck(norm._add_norm.overload, (x, delta, weight, None, 1e-5, 1.0, False))


def test_a_dtype_that_kernels_lack_is_left_to_plain_torch_with_a_word(caplog):
    x = torch.randn(3, 8, dtype=torch.float64)
    weight = torch.ones(8, dtype=torch.float64)
    assert torch.equal(norm.fused_norm(x, weight, None, 1e-5), norm.norm(x, weight, None, 1e-5))
    assert "float64 is not a type of the kernels" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("centred", [True, False])
def test_operators_on_a_gpu_keep_what_they_promise_torch(centred):
    x, delta = draw((3, 2, 16), torch.bfloat16, "cuda", 0), draw((3, 2, 16), torch.bfloat16, "cuda", 1)
    weight, bias = draw((16,), torch.bfloat16, "cuda", 2), draw((16,), torch.bfloat16, "cuda", 3)
    given = (weight.requires_grad_(), bias if centred else None, 1e-5, 0.0, centred)
    opcheck(norm._norm.overload, (x.requires_grad_(), *given))
    opcheck(norm._add_norm.overload, (x, delta, *given))


@pytest.mark.gpu
def test_a_compiled_norm_gives_what_the_kernel_gives():
    inputs = [draw((64, 2, 512), torch.bfloat16, "cuda", 1), draw((512,), torch.bfloat16, "cuda", 2, 0.3, 1)]
    grad = [draw((64, 2, 512), torch.bfloat16, "cuda", 3)]
    function = functools.partial(norm.fused_norm, bias=None, epsilon=1e-5, centred=False)
    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(gradients(compiled, inputs, grad), gradients(function, inputs, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu(2)
def test_a_kernel_runs_on_the_device_and_stream_of_its_tensors():
    x, weight = draw((64, 512), torch.bfloat16, "cuda:1", 1), draw((512,), torch.bfloat16, "cuda:1", 2)
    other = torch.cuda.Stream("cuda:1")
    other.wait_stream(torch.cuda.current_stream("cuda:1"))
    assert torch.cuda.current_device() == 0
    with torch.cuda.stream(other):
        normed = norm.fused_norm(x, weight, None, 1e-5)
    other.synchronize()
    again = norm.fused_norm(x, weight, None, 1e-5)
    assert torch.cuda.current_device() == 0
    assert torch.equal(normed, again)
    torch.testing.assert_close(normed, norm.norm(x, weight, None, 1e-5))
