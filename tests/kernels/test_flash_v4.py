"""flash_v4: which heads it takes, and its operators, which call a stand-in for the package."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.kernels.attention import flash_v4, flash_v4_operator, packages
from megatron.kernels.attention.interface import AttentionRequest
from megatron.kernels.attention.pick import AttentionUnavailableError, pick_attention
from megatron.parallel.recompute import RecomputePolicy, recompute
from tests.kernels.exact_attention import make_heads, make_ids, with_gradients
from tests.kernels.stand_ins import FourthPackage, install
from tests.kernels.test_flash_gpu import usable

OPTIONS = {"scale": 0.3, "causal": True}


@pytest.fixture
def package(monkeypatch):
    """flash-attn-4."""
    return FourthPackage(monkeypatch)


@pytest.fixture
def fourth_is_there(monkeypatch, package):
    """A Hopper GPU with flash-attn-4, as far as questions about it go."""
    flash_v4_operator.why_interface_differs.cache_clear()
    for module in (packages, flash_v4_operator):
        monkeypatch.setattr(module, "version", lambda name: "4.0.0b36")
    monkeypatch.setattr(flash_v4, "why_overwritten", lambda name, path: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    yield
    flash_v4_operator.why_interface_differs.cache_clear()


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


@pytest.mark.usefixtures("fourth_is_there")
@pytest.mark.parametrize("name", flash_v4_operator.CALLED)
@pytest.mark.parametrize(
    ("newer", "difference"),
    [
        (lambda q, **options: None, None),
        (lambda q, k, v: None, "TypeError: got an unexpected keyword argument "),
        (lambda stream, **options: None, "TypeError: missing a required argument: 'stream'"),
    ],
)
def test_a_package_with_another_interface_is_one_sentence(monkeypatch, name, newer, difference):
    install(monkeypatch, "flash_attn.cute.interface", **{name: newer})
    sentence = flash_v4.unavailable()
    if difference is None:
        assert sentence is None
    else:
        assert sentence.startswith(f"flash-attn-4 4.0.0b36 differs from 4.0.0b36 or does not load ({difference}")
        assert sentence.endswith("): pip install 'flash-attn-4[cu13]==4.0.0b36'")
        with pytest.raises(
            AttentionUnavailableError, match=r"flash_v4 cannot honour .*: flash-attn-4 4\.0\.0b36 differs"
        ):
            pick_attention("flash_v4", long_heads(128))


@pytest.mark.usefixtures("fourth_is_there")
def test_a_package_that_does_not_load_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert "does not load (ModuleNotFoundError: import of flash_attn.cute halted" in flash_v4.unavailable()


def test_the_package_is_given_what_was_looked_for_in_its_interface(package):
    for documents in (None, flash_v4.BACKEND.prepare_documents(make_ids(2, 20, 4))):
        with_gradients(attend_by_the_fourth(documents), make_heads((20, 20), 2, (4, 2), 8))
    assert package.given == {name: set(arguments) for name, arguments in flash_v4_operator.CALLED.items()}


def attend_by_the_fourth(documents=None, **options):
    return lambda *heads: torch.sin(
        flash_v4.attend(*heads, dropout=0.0, documents=documents, **{**OPTIONS, **options}) * 2
    )


@pytest.fixture(params=[0, 4], ids=lambda documents: f"{documents} documents")
def documents(request):
    return flash_v4.BACKEND.prepare_documents(make_ids(2, 20, request.param)) if request.param else None


@pytest.mark.usefixtures("package")
def test_the_operators_of_flash_v4_keep_the_rules_of_torch(documents):
    heads = [tensor.transpose(0, 1) for tensor in make_heads((20, 20), 2, (4, 2), 8)]
    offsets = None if documents is None else documents.offsets
    if documents is not None:
        heads = [tensor.detach().flatten(0, 1).requires_grad_() for tensor in heads]
    arguments = (*heads, offsets, 2, 0.3, True, 3, 0.7, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.megatron.flash_v4_forward.default, arguments, test_utils=checks)
    with torch.no_grad():
        output, log_sums = torch.ops.megatron.flash_v4_forward(*arguments)
    backward = (torch.randn_like(output), *arguments[:3], output, log_sums, *arguments[3:])
    torch.library.opcheck(
        torch.ops.megatron.flash_v4_backward.default, backward, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(("budget_bytes", "launches"), [(0, 2), (100_000, 1)])
def test_recompute_keeps_the_output_of_flash_v4_within_its_budget(package, documents, budget_bytes, launches):
    attend, tensors = attend_by_the_fourth(documents), make_heads((20, 20), 2, (4, 2), 8)
    policy = RecomputePolicy(granularity="products", budget_bytes=budget_bytes)
    actual = with_gradients(lambda *heads: recompute(attend, *heads, policy=policy), tensors)
    assert package.forwards == launches
    assert all(torch.equal(a, b) for a, b in zip(actual, with_gradients(attend, tensors), strict=True))


@pytest.mark.usefixtures("package")
def test_the_product_after_flash_v4_reads_its_output_where_it_is():
    output = flash_v4.attend(*make_heads((20, 20), 2, (4, 2), 8), dropout=0.0, **OPTIONS)
    assert output.is_contiguous(), "else the product makes a copy, and keeps it beside this one"


@pytest.mark.usefixtures("package")
def test_flash_v4_compiles_into_one_graph(documents):
    attend, tensors = attend_by_the_fourth(documents, window=3), make_heads((20, 20), 2, (4, 2), 8)
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, tensors), with_gradients(attend, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("package")
def test_one_graph_serves_whatever_the_documents_of_flash_v4():
    def attend(*heads, documents):
        return flash_v4.attend(*heads, dropout=0.0, documents=documents, **OPTIONS)

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")  # as blocks are compiled
    found = [flash_v4.BACKEND.prepare_documents(make_ids(2, 20, 4, seed)) for seed in range(3)]
    assert len({len(documents.offsets) for documents in found}) == len({d.max_length for d in found}) == 3
    tensors = make_heads((20, 20), 2, (4, 2), 8)
    for documents in found:
        expected = with_gradients(attend, tensors, documents=documents)
        for a, b in zip(with_gradients(compiled, tensors, documents=documents), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("options", "pairs"), [({}, 20 * 21 // 2), ({"causal": False}, 400), ({"window": 3}, 1 + 2 + 18 * 3)]
)
def test_flops_of_flash_v4_are_those_of_what_is_seen_but_for_documents(documents, options, pairs):
    tensors = make_heads((20, 20), 2, (4, 2), 8)
    with FlopCounterMode(display=False) as counter:
        output = flash_v4.attend(*tensors, dropout=0.0, documents=documents, **{**OPTIONS, **options})
    assert counter.get_total_flops() == 4 * pairs * 2 * 4 * 8
    with counter:
        output.sum().backward()
    assert counter.get_total_flops() == 10 * pairs * 2 * 4 * 8
