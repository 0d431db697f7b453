"""Attention on a CUDA device: the fused kernels equal the reference, and the fastest is the one that runs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron.kernels.attention import sdpa, unfused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LENGTH, BATCH, HEADS, SIZE = 256, 2, 8, 64
MASKS = ["causal", "full", "documents"]


def heads(query_length, kv_heads, dtype, size=SIZE):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(query_length, BATCH, HEADS, size), *[(LENGTH, BATCH, kv_heads, size)] * 2]
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_() for shape in shapes]


def options(masks):
    document = (torch.arange(LENGTH, device="cuda") >= 100).expand(BATCH, -1)
    mask = document[:, None, :, None] == document[:, None, None, :]
    return {"scale": SIZE**-0.5, "causal": masks != "full", "mask": mask if masks == "documents" else None}


def run(attend, tensors, dropout=0.0, **request):
    output = attend(*tensors, dropout=dropout, **request)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = torch.randn(output.shape, device="cuda", generator=generator).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, upstream)]


def kernels_of(attend, tensors, dropout=0.0, **request):
    """Names of torch's attention operators in forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(attend, tensors, dropout=dropout, **request)
    names = {event.key for event in profiled.key_averages()}
    return {
        kernel
        for kernel in ("cudnn", "flash", "efficient", "math")
        if any("scaled_dot_product" in name and kernel in name for name in names)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("masks", MASKS)
def test_sdpa_equals_the_reference(masks, kv_heads, dtype):
    tensors = heads(LENGTH, kv_heads, dtype)
    exact = run(unfused.attend, [tensor.detach().double().requires_grad_() for tensor in tensors], **options(masks))
    for actual, expected in zip(run(sdpa.attend, tensors, **options(masks)), exact, strict=True):
        assert actual.dtype == dtype
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}[dtype]
        assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("query_length", [1, 7])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_sdpa_equals_the_reference_behind_a_cache(kv_heads, query_length):
    tensors = heads(query_length, kv_heads, torch.bfloat16)
    actual = sdpa.attend(*tensors, dropout=0.0, **options("causal"))
    expected = unfused.attend(*(tensor.double() for tensor in tensors), dropout=0.0, **options("causal"))
    assert (actual - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_half_precision_never_takes_the_unfused_kernel(kv_heads, dropout, masks):
    kernels = kernels_of(sdpa.attend, heads(LENGTH, kv_heads, torch.bfloat16), dropout=dropout, **options(masks))
    assert "math" not in kernels, kernels
    if torch.cuda.get_device_capability()[0] == sdpa.HOPPER:
        assert kernels == {"cudnn"}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_wide_heads_never_take_the_unfused_kernel(kv_heads, masks):
    kernels = kernels_of(sdpa.attend, heads(LENGTH, kv_heads, torch.bfloat16, size=256), **options(masks))
    assert kernels == {"efficient" if masks == "documents" else "flash"}


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("masks", [None, "padding"])
def test_one_token_behind_a_cache_never_waits_for_a_plan_of_cudnn(masks, kv_heads):
    mask = torch.arange(LENGTH, device="cuda").expand(BATCH, 1, 1, -1) != 3 if masks else None
    tensors = heads(1, kv_heads, torch.bfloat16)
    assert kernels_of(sdpa.attend, tensors, scale=0.1, causal=mask is None, mask=mask) == {
        "efficient" if masks else "flash"
    }


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_fp32_takes_the_memory_efficient_kernel(kv_heads, masks):
    assert kernels_of(sdpa.attend, heads(LENGTH, kv_heads, torch.float32), **options(masks)) == {"efficient"}
