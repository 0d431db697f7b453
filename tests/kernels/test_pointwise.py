"""Norms, activations and rotation give what their formulas say."""

import math

import pytest
import torch

from megatron.kernels.activation import ACTIVATIONS
from megatron.kernels.norm import layer_norm, rms_norm
from megatron.kernels.rotary import apply_rotary

X = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT, BIAS = torch.linspace(0.5, 2, 16), torch.linspace(-1, 1, 16)


def expected_layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * WEIGHT.double() + BIAS.double()


def expected_rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * WEIGHT.double()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_follow_their_formulas_in_the_weights_dtype(x_dtype, weight_dtype, offset):
    x, weight, bias = X.to(x_dtype), (WEIGHT - offset).to(weight_dtype), BIAS.to(weight_dtype)
    tolerance = 1e-5 if torch.bfloat16 not in (x_dtype, weight_dtype) else 4e-2
    for actual, expected in (
        (layer_norm(x, weight, bias, 1e-5, weight_offset=offset), expected_layer_norm(X)),
        (rms_norm(x, weight, 1e-5, weight_offset=offset), expected_rms_norm(X)),
    ):
        assert actual.dtype == weight_dtype
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def test_statistics_of_an_fp32_stream_do_not_lose_precision_under_bf16_weights():
    x = 1000 + X.float()  # bf16 would round the differences away
    actual = layer_norm(x, WEIGHT.bfloat16(), BIAS.bfloat16(), 1e-5)
    torch.testing.assert_close(actual.double(), expected_layer_norm(X), atol=3e-2, rtol=3e-2)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "swiglu": lambda x: x[..., :8] / (1 + torch.exp(-x[..., :8])) * x[..., 8:],
    "geglu": lambda x: gelu(x[..., :8]) * x[..., 8:],
    "geglu_tanh": lambda x: gelu_tanh(x[..., :8]) * x[..., 8:],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_follow_their_formulas_and_add_the_bias_first(name):
    torch.testing.assert_close(ACTIVATIONS[name](X), FORMULAS[name](X))
    torch.testing.assert_close(ACTIVATIONS[name](X, BIAS.double()), FORMULAS[name](X + BIAS.double()))


HEADS = torch.randn(6, 2, 3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tables(pairs, rows=10):
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * torch.linspace(0.1, 1, pairs, dtype=torch.float64)
    return angles, angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [6, 4])
@pytest.mark.parametrize("with_ids", [False, True])
def test_rotation_turns_each_pair_by_the_angle_of_its_position(with_ids, pairs, interleaved):
    angles, cos, sin = tables(pairs)
    ids = torch.tensor([[0, 1, 2, 0, 1, 2], [9, 8, 7, 6, 5, 4]]) if with_ids else None
    actual = apply_rotary(HEADS, cos, sin, interleaved=interleaved, position_ids_bs=ids)
    for s in range(6):
        for b in range(2):
            position = s if ids is None else int(ids[b, s])
            for pair in range(pairs):
                i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
                turned = torch.view_as_complex(HEADS[s, b][:, [i, j]]) * torch.exp(1j * angles[position, pair])
                torch.testing.assert_close(actual[s, b][:, [i, j]], torch.view_as_real(turned))
    assert torch.equal(actual[..., 2 * pairs :], HEADS[..., 2 * pairs :])


def test_rotation_computes_in_fp32_and_returns_the_heads_dtype():
    _, cos, sin = tables(6)
    actual = apply_rotary(HEADS.bfloat16(), cos.float(), sin.float())
    assert actual.dtype == torch.bfloat16
    expected = apply_rotary(HEADS.bfloat16().double(), cos, sin).bfloat16()
    assert (actual != expected).float().mean() < 0.01  # at most a rounding at a tie
