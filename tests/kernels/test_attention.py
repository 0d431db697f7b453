"""Every attention backend gives what the reference gives, and is chosen only for what it can do."""

import dataclasses
import math

import pytest
import torch

from megatron.kernels.attention.documents import document_bounds, pack_documents
from megatron.kernels.attention.interface import AttentionBackend, AttentionRequest, prefer
from megatron.kernels.attention.pick import AttentionUnavailableError, pick_attention
from megatron.kernels.attention.unfused import with_softmax
from megatron.kernels.registry import find_implementations
from megatron.kernels.softmax import fused_scaled_softmax, scaled_softmax
from tests.kernels.exact_attention import errors, make_heads, make_ids

ALL = find_implementations("megatron.kernels.attention", AttentionBackend)
BACKENDS = {name: backend for name, backend in ALL.items() if "cpu" in backend.device_types}
REFERENCE = BACKENDS["unfused"]
OTHERS = [backend for name, backend in BACKENDS.items() if name != "unfused" and backend.unavailable() is None]


def heads(query_length, key_length, query_heads, kv_heads, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(query_length, 2, query_heads, 8), (key_length, 2, kv_heads, 8), (key_length, 2, kv_heads, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def run(backend, tensors, **request):
    request = {"scale": 0.3, "causal": True, "dropout": 0.0, "mask": None, **request}
    output = backend.attend(*tensors, **request)
    generator = torch.Generator().manual_seed(1)
    grads = torch.autograd.grad(output, tensors, torch.randn(output.shape, generator=generator).to(output.dtype))
    return [output, *grads]


def document_mask(length):
    document = torch.tensor([[0] * 3 + [1] * (length - 3), [0] * 6 + [1] * (length - 6)])
    return (document[:, None, :, None] == document[:, None, None, :]).contiguous()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", OTHERS, ids=lambda backend: backend.name)
def test_backend_equals_reference(backend, causal, lengths, kv_heads):
    tensors = heads(*lengths, 4, kv_heads)
    torch.testing.assert_close(run(backend, tensors, causal=causal), run(REFERENCE, tensors, causal=causal))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", OTHERS, ids=lambda backend: backend.name)
def test_backend_equals_reference_under_a_document_mask(backend, causal, kv_heads):
    tensors, mask = heads(9, 9, 4, kv_heads), document_mask(9)
    actual = run(backend, tensors, causal=causal, mask=mask)
    torch.testing.assert_close(actual, run(REFERENCE, tensors, causal=causal, mask=mask))


@pytest.mark.parametrize("softmax", [scaled_softmax, fused_scaled_softmax])
def test_a_query_that_may_attend_to_nothing_gives_zeros_and_no_gradient(softmax):
    tensors, mask = heads(9, 9, 4, 2), document_mask(9).clone()
    mask[0, :, 4] = False
    output, query_grad, *others = run(with_softmax(REFERENCE, softmax), tensors, mask=mask)
    assert not output[4, 0].any()
    assert not query_grad[4, 0].any()
    assert all(grad.isfinite().all() for grad in others)
    mask[0, :, 4] = document_mask(9)[0, :, 4]
    rest = torch.arange(9) != 4
    torch.testing.assert_close(output[rest], run(REFERENCE, tensors, mask=mask)[0][rest])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(9, 9), (1, 9), (4, 9)])
def test_another_softmax_changes_nothing_in_the_reference_and_no_other_backend(lengths, causal):
    tensors = heads(*lengths, 4, 2)
    fused = with_softmax(REFERENCE, fused_scaled_softmax)
    torch.testing.assert_close(run(fused, tensors, causal=causal), run(REFERENCE, tensors, causal=causal))
    assert all(with_softmax(backend, fused_scaled_softmax) is backend for backend in OTHERS)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_reference_equals_the_formula(kv_heads):
    tensors = query, key, value = heads(5, 7, 4, kv_heads)
    expected = torch.empty_like(query)
    for batch in range(2):
        for head in range(4):
            kv_head = head // (4 // kv_heads)
            for i in range(5):
                visible = 7 - 5 + i + 1
                weights = (key[:visible, batch, kv_head] @ query[i, batch, head] * 0.3).softmax(dim=0)
                expected[i, batch, head] = weights @ value[:visible, batch, kv_head]
    torch.testing.assert_close(run(REFERENCE, tensors)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_bf16_stays_bf16(backend):
    tensors = heads(9, 9, 4, 2, torch.bfloat16)
    output = run(backend, tensors)[0]
    assert output.dtype == torch.bfloat16
    expected = run(REFERENCE, [tensor.detach().float().requires_grad_() for tensor in tensors])[0]
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_dropout_keeps_the_mean_and_drops_the_stated_share(backend):
    torch.manual_seed(0)
    length, probability = 400, 0.25
    query = key = torch.zeros(length, 1, 1, 8)
    value = torch.ones(length, 1, 1, 8)
    output = backend.attend(query, key, value, scale=1.0, causal=False, dropout=probability)
    # Each output is the kept share of equal weights, over the kept probability: mean 1, variance p / ((1 - p) length).
    assert output.mean() == pytest.approx(1.0, abs=0.01)
    assert output[..., 0].std() == pytest.approx(math.sqrt(probability / (1 - probability) / length), rel=0.15)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_the_same_seed_drops_the_same_weights(backend):
    tensors = heads(9, 9, 4, 2)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(run(backend, tensors, dropout=0.5)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_causal_mask_made_while_generating_serves_a_backward():
    lengths = (4, 17)  # no other test's
    with torch.inference_mode():
        REFERENCE.attend(*heads(*lengths, 4, 4), scale=1.0, causal=True, dropout=0.0)
    tensors = heads(*lengths, 4, 4)
    torch.testing.assert_close(run(REFERENCE, tensors), run(BACKENDS["sdpa"], tensors))


REQUEST = AttentionRequest(head_size=64, dtype=torch.float32, device_type="cpu", dropout=0.1, gqa=True)


def test_auto_takes_the_fastest_and_says_why():
    backend, reason = pick_attention("auto", REQUEST)
    assert backend.name == "sdpa"
    assert "fastest" in reason
    assert "dropout, gqa" in reason


def test_a_named_backend_is_taken():
    assert pick_attention("unfused", REQUEST)[0].name == "unfused"


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(AttentionUnavailableError, match=r"flash_v9 is not known; choose one of auto, flash_triton, "):
        pick_attention("flash_v9", REQUEST)


def test_a_request_that_nobody_can_honour_raises_every_reason():
    request = AttentionRequest(head_size=64, dtype=torch.float64, device_type="cpu")
    with pytest.raises(
        AttentionUnavailableError, match=r"sdpa: it does not compute in float64; .*unfused: it does not"
    ):
        pick_attention("auto", request)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"features": frozenset({"gqa"})}, "it lacks dropout"),
        ({"device_types": frozenset({"cuda"})}, "it does not run on cpu"),
        ({"max_head_size": 32}, "its heads have at most 32 channels, not 64"),
        ({"head_size_multiple": 48}, "its heads have a multiple of 48 channels, not 64"),
        ({"head_sizes": (80, 96, 128)}, "its heads have 80, 96 or 128 channels, not 64"),
        ({"head_sizes": (64, 96, 128)}, None),
        ({"excludes": (frozenset({"gqa", "dropout"}),)}, "it lacks dropout with gqa"),
        ({"unavailable": lambda: "flash-attn is not installed"}, "flash-attn is not installed"),
        ({}, None),
    ],
)
def test_a_backend_says_why_it_cannot(limits, reason):
    backend = AttentionBackend(name="x", choose_when="", preference=prefer(0), attend=REFERENCE.attend, **limits)
    assert backend.why_not(REQUEST) == reason


@pytest.mark.parametrize(("lengths", "window"), [((9, 9), 3), ((1, 9), 3), ((4, 9), 6), ((9, 9), 99)])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_a_window_hides_the_keys_before_it(backend, lengths, window):
    tensors = make_heads(lengths, 2, (4, 2), 8)
    assert max(errors(backend, tensors, scale=0.3, causal=True, window=window)) < 1e-6


def test_a_window_needs_causal_attention():
    for backend in BACKENDS.values():
        with pytest.raises(ValueError, match="needs causal attention"):
            backend.attend(*make_heads((9, 9), 1, (1, 1), 8), scale=1.0, causal=False, dropout=0.0, window=3)


@pytest.mark.parametrize("causal", [True, False])
def test_capped_logits_of_the_reference(causal):
    tensors = make_heads((9, 9), 2, (4, 2), 8)
    assert max(errors(REFERENCE, tensors, scale=0.9, causal=causal, softcap=0.7)) < 1e-6


def test_sdpa_refuses_to_cap_logits():
    with pytest.raises(ValueError, match="do not cap logits"):
        BACKENDS["sdpa"].attend(*make_heads((9, 9), 1, (1, 1), 8), scale=1.0, causal=True, dropout=0.0, softcap=1.0)
    assert BACKENDS["sdpa"].why_not(dataclasses.replace(REQUEST, softcap=True)) == "it lacks softcap"


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": False}, {"causal": True, "window": 4}])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_documents_given_as_bounds(backend, options):
    assert max(errors(backend, make_heads((20, 20), 2, (4, 2), 8), ids=make_ids(2, 20, 4), scale=0.3, **options)) < 1e-6


def test_document_bounds_are_those_of_each_tokens_document():
    bounds = document_bounds(torch.tensor([[0, 0, 0, 2, 2, 3], [1, 1, 1, 1, 1, 1]]))
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [[[0, 0, 0, 3, 3, 5], [3, 3, 3, 5, 5, 6]], [[0] * 6, [6] * 6]]


def test_packed_documents_never_reach_over_samples():
    packed = pack_documents(torch.tensor([[0, 0, 0, 1, 1, 2], [2, 2, 2, 2, 3, 3]]))
    assert (packed.offsets.tolist(), packed.max_length) == ([0, 3, 5, 6, 10, 12], 4)
    assert packed.offsets.dtype == torch.int32


@pytest.mark.parametrize("name", sorted(set(ALL) - set(BACKENDS)))
def test_a_backend_for_gpus_says_so_on_the_cpu(name):
    request = dataclasses.replace(REQUEST, dtype=torch.bfloat16, dropout=0.0, gqa=False)
    assert ALL[name].why_not(request) == "it does not run on cpu"


@pytest.mark.parametrize("size", [64, 128])
def test_preferences_follow_the_measured_speeds(monkeypatch, size):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))

    def order(**needs):
        request = AttentionRequest(head_size=size, dtype=torch.bfloat16, device_type="cuda", **needs)
        return sorted(ALL, key=lambda name: -ALL[name].preference(request))

    for measured in (2048, 8192, 32768):
        assert order(sequence_length=measured)[:2] == ["flash_v4", "sdpa_cudnn"]
    for unmeasured in (1024, None):
        assert order(sequence_length=unmeasured)[0] == ("flash_v4" if size == 64 else "sdpa_cudnn")
    documents = order(sequence_length=8192, documents=True)
    assert documents.index("flash_triton") < documents.index("flash_v2") < documents.index("sdpa")


@pytest.mark.parametrize(("capability", "first"), [((9, 0), "flash_triton"), ((8, 0), "sdpa")])
def test_heads_too_wide_for_cudnn_take_the_triton_kernels_where_these_were_measured(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    request = AttentionRequest(head_size=256, dtype=torch.bfloat16, device_type="cuda")
    assert max(("sdpa", "flash_triton", "sdpa_flash"), key=lambda name: ALL[name].preference(request)) == first
