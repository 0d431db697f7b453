"""Every fused operation for a thousand random shapes on a GPU, a few small ones where kernels are emulated.

Odd sizes, sizes for vectors, no rows; scales from tiny to huge. Each is compared with fp64 and with a second run.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.kernels import rotary
from megatron.kernels.activation import ACTIVATIONS
from tests.kernels import test_fused_dropout, test_fused_norm, test_fused_pointwise, test_fused_softmax
from tests.kernels.fused import check_against_fp64, kernels_on

HALF_AND_SINGLE = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def sizes(most: int) -> st.SearchStrategy[int]:
    """From 1 to `most`, as many that 8 divides as others."""
    return st.one_of(st.integers(1, most), st.integers(1, max(1, most // 8)).map(lambda eighth: 8 * eighth))


def cases(device: str, gpu_examples: int):
    """Settings for a device, and the largest number of rows and columns there."""
    of_device = settings(
        max_examples=gpu_examples if device == "cuda" else 8,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=True,
    )
    return of_device, (700, 6000) if device == "cuda" else (6, 300)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_norms(device):
    of_device, (rows, columns) = cases(device, 250)

    @of_device
    @given(
        rows=st.integers(1, rows),
        columns=sizes(columns),
        dtypes=st.sampled_from(test_fused_norm.DTYPES),
        centred=st.booleans(),
        added=st.booleans(),
    )
    def check(rows, columns, dtypes, centred, added):
        test_fused_norm.check(device, rows, columns + (columns == 1), *dtypes, centred=centred, added=added)

    check()


@pytest.mark.parametrize("device", DEVICES)
def test_activations(device):
    of_device, (rows, columns) = cases(device, 200)

    @of_device
    @given(
        rows=st.integers(1, rows),
        columns=sizes(columns // 2),
        name=st.sampled_from(sorted(ACTIVATIONS)),
        dtype=HALF_AND_SINGLE,
        biased=st.booleans(),
    )
    def check(rows, columns, name, dtype, biased):
        test_fused_pointwise.check_activation(device, name, rows, columns, dtype, biased=biased)

    check()


@pytest.mark.parametrize("device", DEVICES)
def test_rotations(device):
    of_device, _ = cases(device, 150)

    @of_device
    @given(
        length=st.integers(1, 70),
        batch=st.integers(1, 4),
        groups=st.integers(1, 4),
        heads=st.integers(1, 3),
        half=sizes(40),
        share=st.integers(1, 4),
        interleaved=st.booleans(),
        dtype=HALF_AND_SINGLE,
    )
    def check(length, batch, groups, heads, half, share, interleaved, dtype):
        size, pairs = 2 * half, max(1, half // share)
        length = length if device == "cuda" else 1 + length % 7
        cosine, sine = test_fused_pointwise.tables(length, pairs, device)
        product = test_fused_pointwise.draw((length, batch, groups * (heads + 2) * size), dtype, device)

        def fused(x):
            return rotary.fused_split(x, cosine, sine, groups=groups, head_size=size, interleaved=interleaved)

        def plain(x):
            return rotary.split_rotary(x, cosine, sine, groups=groups, head_size=size, interleaved=interleaved)

        shapes = [(length, batch, count, size) for count in (groups * heads, groups, groups)]
        grads = [test_fused_pointwise.draw(shape, dtype, device, 1 + i) for i, shape in enumerate(shapes)]
        with kernels_on(device):
            check_against_fp64(fused, plain, [product], grads)

    check()


@pytest.mark.parametrize("device", DEVICES)
def test_dropout(device):
    of_device, (rows, columns) = cases(device, 150)

    @of_device
    @given(
        rows=st.integers(0, rows),
        columns=sizes(columns),
        first=st.one_of(st.integers(0, 2**40), st.integers(0, 2**37).map(lambda eighth: 8 * eighth)),
        probability=st.floats(0.0, 0.999),
        dtypes=st.sampled_from(test_fused_dropout.TYPE_PAIRS),
        biased=st.booleans(),
    )
    def check(rows, columns, first, probability, dtypes, biased):
        shape = (rows, columns)
        test_fused_dropout.check_bits(device, shape, *dtypes, biased=biased, first=first, probability=probability)

    check()


@pytest.mark.parametrize("device", DEVICES)
def test_softmax(device):
    of_device, (rows, keys) = cases(device, 200)

    @of_device
    @given(
        batch=st.integers(1, 3),
        heads=st.integers(1, 3),
        queries=st.integers(1, max(1, rows // 10)),
        keys=sizes(keys),
        dtype=HALF_AND_SINGLE,
        causal=st.booleans(),
        masked=st.booleans(),
        scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]),
    )
    def check(batch, heads, queries, keys, dtype, causal, masked, scale):
        shape = (batch, heads, queries, keys)
        test_fused_softmax.check(device, shape, dtype, causal=causal, masked=masked, scale=scale)

    check()


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy(device):
    of_device, (rows, columns) = cases(device, 100)

    @of_device
    @given(
        rows=st.integers(1, rows),
        columns=sizes(8 * columns),
        padding=st.integers(0, 130),
        dtype=HALF_AND_SINGLE,
        scale=st.sampled_from([1e-3, 5.0, 300.0]),
    )
    def check(rows, columns, padding, dtype, scale):
        # Of huge logits a token's loss may be less than fp32 resolves beside 1: there torch's own error is the measure.
        test_fused_pointwise.check_cross_entropy(
            device, rows, columns + padding, columns, dtype, scale=scale, beside_torch=scale > 100
        )

    check()
