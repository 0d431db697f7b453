"""What the backends of optional packages hand to them: stand-ins with the packages' signatures compute it exactly."""

import sys
import types

import pytest
import torch

from megatron.kernels.attention import flash_v1, flash_v2, flash_v4, packages
from megatron.kernels.attention.interface import AttentionRequest
from megatron.kernels.attention.pick import AttentionUnavailableError, pick_attention
from tests.kernels.exact_attention import errors, exact_attend, make_heads, make_ids
from tests.kernels.test_flash_gpu import usable

OPTIONS = {"scale": 0.3, "causal": True}


def whole(q, k, v, causal, scale, window=0, softcap=0.0):
    """[b, s, heads, d] in and out."""
    query, key, value = (tensor.transpose(0, 1) for tensor in (q, k, v))
    output = exact_attend(query, key, value, scale=scale, causal=causal, window=window, softcap=softcap)
    return output.to(q.dtype).transpose(0, 1)


def packed(q, k, v, offsets_q, offsets_k, longest_q, longest_k, **options):
    """[tokens, heads, d] in and out."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    lengths = offsets_q.diff()
    assert longest_q == longest_k == lengths.max()
    starts = offsets_q[:-1].tolist()
    assert offsets_q[-1] == len(q)
    parts = [slice(start, start + length) for start, length in zip(starts, lengths.tolist(), strict=True)]
    return torch.cat([whole(q[None, part], k[None, part], v[None, part], **options)[0] for part in parts])


def install(monkeypatch, name, **functions):
    for place in range(1, len(name.split(".")) + 1):
        path = ".".join(name.split(".")[:place])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    module = sys.modules[name]
    for function_name, function in functions.items():
        monkeypatch.setattr(module, function_name, function, raising=False)
    parent, _, child = name.rpartition(".")
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


@pytest.fixture
def second(monkeypatch):
    """flash-attn 2.x."""
    calls = []

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    ):
        calls.append((dropout_p, deterministic))
        assert window_size[1] == (0 if window_size[0] >= 0 else -1)
        return whole(q, k, v, causal, softmax_scale, window_size[0] + 1, softcap)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    ):
        calls.append((dropout_p, deterministic))
        options = {"causal": causal, "scale": softmax_scale, "window": window_size[0] + 1, "softcap": softcap}
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    install(monkeypatch, "flash_attn", **functions)
    install(monkeypatch, "flash_attn.flash_attn_interface", **functions)
    return calls


@pytest.fixture
def first(monkeypatch):
    """flash-attn 1.x: as many key heads as query heads, and no keyword for a window."""
    calls = []

    def flash_attn_unpadded_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale=None,
        causal=False,
        return_attn_probs=False,
        deterministic=False,
    ):
        calls.append((dropout_p, deterministic))
        assert q.shape == k.shape
        options = {"causal": causal, "scale": softmax_scale}
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    install(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_unpadded_func=flash_attn_unpadded_func)
    return calls


@pytest.fixture
def fourth(monkeypatch):
    """flash-attn-4, whose functions return the log-sums as well."""
    calls = []

    def flash_attn_func(
        q, k, v, qv=None, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, deterministic=False
    ):
        calls.append((0.0, deterministic))
        window = 0 if window_size[0] is None else window_size[0] + 1
        return whole(q, k, v, causal, softmax_scale, window, softcap), None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        softcap=0.0,
        deterministic=False,
    ):
        calls.append((0.0, deterministic))
        window = 0 if window_size[0] is None else window_size[0] + 1
        options = {"causal": causal, "scale": softmax_scale, "window": window, "softcap": softcap}
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options), None

    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    install(monkeypatch, "flash_attn.cute", **functions)
    return calls


@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.7}, {"causal": False}])
@pytest.mark.parametrize("module", [flash_v2, flash_v4])
@pytest.mark.usefixtures("second", "fourth")
def test_the_package_is_asked_for_the_right_thing(module, options, documents):
    ids = make_ids(2, 20, documents) if documents else None
    assert max(errors(module.BACKEND, make_heads((20, 20), 2, (4, 2), 8), ids=ids, **{**OPTIONS, **options})) < 1e-6


@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("interface", ["first", "second"])
def test_flash_v1_takes_the_interface_that_is_there(request, interface, causal, documents):
    request.getfixturevalue(interface)
    ids = make_ids(2, 20, documents) if documents else None
    assert max(errors(flash_v1.BACKEND, make_heads((20, 20), 2, (4, 2), 8), ids=ids, scale=0.3, causal=causal)) < 1e-6


@pytest.mark.parametrize("module", [flash_v1, flash_v2])
def test_the_probability_of_dropout_is_handed_on(second, module):
    module.attend(*make_heads((9, 9), 1, (2, 2), 8), dropout=0.25, **OPTIONS)
    assert [dropout for dropout, _ in second] == [0.25]


@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(
    ("module", "package"), [(flash_v1, "first"), (flash_v1, "second"), (flash_v2, "second"), (flash_v4, "fourth")]
)
def test_the_same_bits_are_asked_for_where_torch_is_asked_for_them(request, module, package, wanted, documents):
    calls = request.getfixturevalue(package)
    packed = module.BACKEND.prepare_documents(make_ids(2, 9, documents)) if documents else None
    torch.use_deterministic_algorithms(wanted)
    try:
        module.attend(*make_heads((9, 9), 2, (2, 2), 8), dropout=0.0, documents=packed, **OPTIONS)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == [(0.0, wanted)]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (flash_v1, {"window": 3}),
        (flash_v1, {"softcap": 1.0}),
        (flash_v2, {"softcap": 1.0, "dropout": 0.1}),
        (flash_v4, {"dropout": 0.1}),
        *[(module, {"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}) for module in (flash_v1, flash_v2, flash_v4)],
    ],
)
@pytest.mark.usefixtures("second", "fourth")
def test_what_a_package_cannot_do_is_an_error(module, options):
    with pytest.raises(ValueError, match=module.BACKEND.name):
        module.attend(*make_heads((9, 9), 1, (2, 2), 8), **{"dropout": 0.0, **OPTIONS, **options})


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, "flash-attn is not installed: pip install 'megatron-deepspeed[flash-attn]'"),
        ("2.5.9", "flash-attn 2.5 is older than 2.6: pip install 'megatron-deepspeed[flash-attn]'"),
        ("2.8.3", "it needs an NVIDIA GPU of compute capability 8.0 or later"),
    ],
)
def test_a_missing_package_is_one_sentence(monkeypatch, found, sentence):
    def version(name):
        if found is None:
            raise packages.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(packages, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash_v2.unavailable() == sentence


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("of flash-attn-4", "it needs an NVIDIA GPU of compute capability 9.0 or later"),
        (
            "of another",
            "another package wrote over its flash_attn/cute/interface.py: "
            "pip install --force-reinstall --no-deps flash-attn-4",
        ),
    ],
)
def test_a_package_that_another_wrote_over_is_one_sentence(monkeypatch, tmp_path, written, sentence):
    information, code = tmp_path / "flash_attn_4-4.0.0b36.dist-info", tmp_path / "flash_attn" / "cute"
    information.mkdir()
    code.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n")
    (information / "RECORD").write_text(f"flash_attn/cute/interface.py,,{len('of flash-attn-4')}\n")
    (code / "interface.py").write_text(written)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash_v4.unavailable() == sentence


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("size", [192, 256])
def test_flash_v2_refuses_what_its_backward_leaves_out(monkeypatch, size, dropout, capability):
    monkeypatch.setattr(packages, "version", lambda name: "2.8.3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    request = AttentionRequest(head_size=size, dtype=torch.bfloat16, device_type="cuda", dropout=dropout)
    refused = flash_v2.BACKEND.why_not(request)
    if size == 256 and dropout and capability == (8, 9):
        assert refused == "on this GPU it drops no weights in backward of heads wider than 192, not 256"
    else:
        assert refused is None


@pytest.fixture
def fourth_is_there(monkeypatch):
    """A Hopper GPU with flash-attn-4, as far as questions about it go."""
    monkeypatch.setattr(packages, "version", lambda name: "4.0.0b36")
    monkeypatch.setattr(flash_v4, "why_overwritten", lambda name, path: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))


def long_heads(size):
    return AttentionRequest(head_size=size, dtype=torch.bfloat16, device_type="cuda", sequence_length=4096)


@pytest.mark.usefixtures("fourth_is_there")
@pytest.mark.parametrize("size", [64, 96, 128])
def test_auto_takes_flash_v4_for_heads_that_it_is_proven_with(size):
    backend, reason = pick_attention("auto", long_heads(size))
    assert backend is flash_v4.BACKEND
    assert "flash-attn-4, on Hopper the fastest from 2k tokens on" in reason


@pytest.mark.usefixtures("fourth_is_there")
@pytest.mark.parametrize("size", [8, 32, 72, 80, 112, 192, 256])
def test_flash_v4_refuses_heads_that_it_is_not_proven_with(size):
    sentence = f"its heads have 64, 96 or 128 channels, not {size}"
    backend, reason = pick_attention("auto", long_heads(size))
    assert backend is not flash_v4.BACKEND
    assert f"flash_v4: {sentence}" in reason
    with pytest.raises(AttentionUnavailableError, match=f"flash_v4 cannot honour .*: {sentence}; .* can"):
        pick_attention("flash_v4", long_heads(size))


@pytest.mark.usefixtures("fourth_is_there")
def test_the_tests_on_a_gpu_skip_what_flash_v4_refuses():
    with pytest.raises(pytest.skip.Exception, match="its heads have 64, 96 or 128 channels, not 80"):
        usable("flash_v4", head_size=80)
    assert usable("flash_v4", head_size=96) is flash_v4.BACKEND
