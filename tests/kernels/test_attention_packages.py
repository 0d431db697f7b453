"""What the backends of optional packages hand to them: stand-ins with the packages' signatures compute it exactly."""

import pytest
import torch

from megatron.kernels.attention import flash_v1, flash_v2, flash_v4, packages
from megatron.kernels.attention.interface import AttentionRequest
from tests.kernels.exact_attention import errors, make_heads, make_ids
from tests.kernels.stand_ins import FourthPackage, install, packed, whole

OPTIONS = {"scale": 0.3, "causal": True}


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
    """flash-attn-4."""
    return FourthPackage(monkeypatch).calls


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
        output = module.attend(*make_heads((9, 9), 2, (2, 2), 8), dropout=0.0, documents=packed, **OPTIONS)
        output.sum().backward()
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
