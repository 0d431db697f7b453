"""The fused backends on a CUDA device, against attention in fp64."""

import pytest
import torch

from megatron.kernels.attention.interface import AttentionBackend, AttentionRequest
from megatron.kernels.registry import find_implementations
from tests.kernels.exact_attention import errors, exact_attend, make_heads, make_ids, with_gradients

pytestmark = pytest.mark.gpu

BACKENDS = find_implementations("megatron.kernels.attention", AttentionBackend)
NAMES = [name for name in BACKENDS if name not in ("sdpa", "unfused")]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPTIONS = {"scale": 0.1, "causal": True}


def usable(name, **needs):
    """The backend, or a skip that says why it cannot."""
    backend = BACKENDS[name]
    request = AttentionRequest(**{"head_size": 64, "dtype": torch.bfloat16, "device_type": "cuda", **needs})
    if reason := backend.why_not(request):
        pytest.skip(reason)
    return backend


def on_gpu(lengths, batch, heads, size, dtype=torch.bfloat16):
    return make_heads(lengths, batch, heads, size, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_every_head_size_and_dtype(name, size, dtype):
    backend = usable(name, head_size=size, dtype=dtype)
    worst = max(errors(backend, on_gpu((515, 515), 2, (4, 4), size, dtype), **OPTIONS))
    assert worst < TOLERANCE[dtype]


@pytest.mark.parametrize("length", [3, 17, 128, 1000])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_odd_lengths_and_grouped_heads(name, kv_heads, causal, length):
    backend = usable(name, gqa=True, causal=causal)
    assert max(errors(backend, on_gpu((length, length), 2, (4, kv_heads), 64), scale=0.1, causal=causal)) < 1e-2


@pytest.mark.parametrize("lengths", [(1, 300), (64, 300), (129, 513)])
@pytest.mark.parametrize("name", NAMES)
def test_keys_from_a_cache(name, lengths):
    backend = usable(name, gqa=True, cache=True)
    assert max(errors(backend, on_gpu(lengths, 2, (4, 2), 128), **OPTIONS)) < 1e-2


@pytest.mark.parametrize("window", [2, 33, 128, 5000])
@pytest.mark.parametrize("name", NAMES)
def test_window(name, window):
    backend = usable(name, window=True)
    assert max(errors(backend, on_gpu((700, 700), 1, (2, 2), 128), window=window, **OPTIONS)) < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_softcap(name):
    backend = usable(name, softcap=True)
    assert max(errors(backend, on_gpu((300, 300), 1, (2, 2), 128), softcap=0.7, **OPTIONS)) < 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [3, 40])
@pytest.mark.parametrize("name", NAMES)
def test_documents(name, documents, causal):
    backend = usable(name, documents=True, gqa=True, causal=causal)
    ids = make_ids(2, 900, documents, device="cuda")
    assert max(errors(backend, on_gpu((900, 900), 2, (4, 2), 64), ids=ids, scale=0.1, causal=causal)) < 1e-2


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", ["flash_triton", "flash_v4"])
def test_documents_under_a_window_with_capped_logits(name, size):
    backend = usable(name, head_size=size, documents=True, window=True, softcap=True, gqa=True)
    ids = make_ids(2, 700, 9, device="cuda")
    worst = max(errors(backend, on_gpu((700, 700), 2, (4, 2), size), ids=ids, window=50, softcap=1.0, **OPTIONS))
    assert worst < 1e-2


@pytest.mark.parametrize("name", ["flash_triton", "flash_v4"])
def test_heads_that_stride_over_a_fused_product(name):
    product = torch.randn(260, 2, 2, 4, 128, device="cuda").bfloat16()
    tensors = [product[..., :2, :].flatten(2, 3), product[..., 2, :], product[..., 3, :]]
    assert max(errors(usable(name, head_size=128, gqa=True), tensors, **OPTIONS)) < 1e-2


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("name", ["flash_triton", "sdpa_flash", "flash_v1", "flash_v2", "flash_v4"])
def test_the_same_bits_every_time(name, kv_heads, size):
    backend, tensors = usable(name, head_size=size, gqa=kv_heads < 4), on_gpu((1000, 1000), 2, (4, kv_heads), size)
    torch.use_deterministic_algorithms(name != "flash_triton")  # which is so unasked
    try:
        runs = [with_gradients(backend.attend, tensors, dropout=0.0, **OPTIONS) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("length", [200, 256])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_backward_drops_the_weights_that_forward_dropped(name, size, length):
    probability = 0.3
    backend = usable(name, dropout=probability, head_size=size, causal=False)
    query, key, _ = on_gpu((length, length), 2, (2, 2), size)
    # With one-hot values the output is the matrix of weights: what forward drops is read from it, tile by tile.
    kept = torch.empty(2, 2, length, length, dtype=torch.float64, device="cuda")
    for first in range(0, length, size):
        value = torch.eye(length, device="cuda", dtype=torch.bfloat16)[:, None, None, first : first + size]
        value = torch.nn.functional.pad(value, (0, size - value.shape[-1])).expand(length, 2, 2, size).contiguous()
        torch.manual_seed(5)
        weights = backend.attend(query, key, value, scale=0.1, causal=False, dropout=probability)
        columns = min(size, length - first)
        kept[..., first : first + columns] = (weights.permute(1, 2, 0, 3)[..., :columns] > 0).double()
    assert kept.mean().item() == pytest.approx(1 - probability, abs=0.01)

    def attend(*tensors):
        torch.manual_seed(5)
        return backend.attend(*tensors, scale=0.1, causal=False, dropout=probability)

    tensors = on_gpu((length, length), 2, (2, 2), size)
    actual = with_gradients(attend, tensors)
    expected = with_gradients(
        exact_attend, [tensor.double() for tensor in tensors], scale=0.1, causal=False, kept=kept / (1 - probability)
    )
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-2 * e.norm()


@pytest.mark.parametrize("name", ["flash_triton", "flash_v4"])
def test_an_operator_of_this_project_compiles_into_one_graph(name):
    backend = usable(name)
    tensors = on_gpu((256, 256), 2, (4, 2), 64)

    def attend(query, key, value):
        return backend.attend(query * 2, key, value, dropout=0.0, **OPTIONS) * 3

    compiled = torch.compile(attend, fullgraph=True)
    for a, e in zip(with_gradients(compiled, tensors), with_gradients(attend, tensors), strict=True):
        assert (a.float() - e.float()).norm() <= 1e-2 * e.float().norm()
