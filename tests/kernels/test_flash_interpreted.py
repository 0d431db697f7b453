"""This project's attention kernels in Triton's interpreter, in fp32, against attention in fp64."""

import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from megatron.kernels.attention import flash_triton, unfused
from megatron.kernels.attention.documents import document_bounds
from megatron.kernels.attention.flash.tuning import Tile
from megatron.parallel.recompute import RecomputePolicy, recompute
from tests.kernels.exact_attention import errors, exact_attend, make_heads, make_ids, with_gradients

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles: there is a GPU")

TRITON = flash_triton.BACKEND
ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def _interpreter_reads_loop_bounds(monkeypatch):
    """Numpy no longer makes a number of an array of one, which the interpreter asks for."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences have inner, first, last and diagonal ones."""
    monkeypatch.setattr("megatron.kernels.attention.flash.launch._tile", lambda kernel, query: Tile(32, 16, 4, 1))


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_every_head_size(size):
    assert max(errors(TRITON, make_heads((33, 33), 1, (2, 1), size), scale=0.1, causal=True)) < ROUNDING


@pytest.mark.parametrize(
    ("lengths", "heads", "options"),
    [
        ((50, 50), (2, 2), {}),
        ((50, 50), (4, 2), {}),
        ((48, 48), (2, 1), {}),
        ((50, 50), (2, 1), {"causal": False}),
        ((48, 48), (2, 2), {"causal": False}),
        ((1, 55), (2, 2), {}),
        ((33, 55), (2, 1), {}),
        ((33, 55), (2, 1), {"window": 20}),
        ((50, 50), (2, 1), {"window": 2}),
        ((50, 50), (2, 1), {"window": 23}),
        ((50, 50), (2, 1), {"window": 500}),
        ((50, 50), (2, 1), {"softcap": 0.7}),
        ((50, 50), (2, 1), {"softcap": 0.7, "window": 23}),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_every_feature_at_odd_lengths(lengths, heads, options):
    tensors = make_heads(lengths, 1, heads, 16)
    assert max(errors(TRITON, tensors, **{"scale": 0.3, "causal": True, **options})) < ROUNDING


@pytest.mark.parametrize("documents", [2, 20])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9, "softcap": 0.7}])
@pytest.mark.usefixtures("small_tiles")
def test_documents(options, documents):
    tensors, ids = make_heads((50, 50), 2, (2, 1), 16), make_ids(2, 50, documents)
    assert max(errors(TRITON, tensors, ids=ids, **{"scale": 0.3, "causal": True, **options})) < ROUNDING


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (64, 64)])
def test_tiles_of_the_copy_engine(monkeypatch, shape):
    tile = Tile(*shape, warps=4, stages=1, tma=True)
    monkeypatch.setattr("megatron.kernels.attention.flash.launch._tile", lambda kernel, query: tile)
    tensors, ids = make_heads((50, 50), 1, (2, 1), 24), make_ids(1, 50, 3)
    assert max(errors(TRITON, tensors, ids=ids, scale=0.3, causal=True)) < ROUNDING


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}])
def test_keys_and_values_one_after_the_other(monkeypatch, options):
    tile = Tile(16, 32, warps=4, stages=1, apart=True)
    monkeypatch.setattr("megatron.kernels.attention.flash.launch._tile", lambda kernel, query: tile)
    tensors, ids = make_heads((50, 50), 1, (4, 2), 16), make_ids(1, 50, 3)
    assert max(errors(TRITON, tensors, ids=ids, scale=0.3, causal=True, **options)) < ROUNDING


@pytest.mark.parametrize("backend", [TRITON, unfused.BACKEND], ids=lambda backend: backend.name)
def test_packed_documents_have_the_gradients_of_the_documents_alone(backend):
    lengths = [5, 1, 40, 18]
    tensors = make_heads((64, 64), 1, (2, 1), 16)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    options = {"scale": 0.3, "causal": True, "dropout": 0.0}
    packed = with_gradients(backend.attend, tensors, documents=document_bounds(ids), **options)
    grad = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(1))  # that of with_gradients
    for start, length in zip([0, 5, 6, 46], lengths, strict=True):
        rows = slice(start, start + length)
        alone = [tensor.detach()[rows].requires_grad_() for tensor in tensors]
        output = backend.attend(*alone, **options)
        expected = [output, *torch.autograd.grad(output, alone, grad[rows])]
        torch.testing.assert_close([tensor[rows] for tensor in packed], expected, atol=1e-5, rtol=1e-5)


def dropped(query, key, probability, causal, size):
    """Factors of dropout on each weight, read from forward: with one-hot values the output is the weights."""
    batch, heads, length, key_length = query.shape[1], query.shape[2], query.shape[0], key.shape[0]
    kept = torch.empty(batch, heads, length, key_length, dtype=torch.float64)
    for first in range(0, key_length, size):
        value = torch.eye(key_length)[:, None, None, first : first + size].expand(-1, batch, key.shape[2], -1)
        torch.manual_seed(5)
        weights = flash_triton.attend(
            query, key, value.contiguous(), scale=0.3, causal=causal, dropout=probability
        ).permute(1, 2, 0, 3)
        kept[..., first : first + size] = weights > 0
    return kept


@pytest.mark.parametrize(("kv_heads", "causal", "apart"), [(2, False, False), (1, True, False), (1, True, True)])
def test_backward_drops_what_forward_dropped(monkeypatch, kv_heads, causal, apart):
    tile = Tile(32, 16, 4, 1, apart=apart)
    monkeypatch.setattr("megatron.kernels.attention.flash.launch._tile", lambda kernel, query: tile)
    probability, tensors = 0.3, make_heads((48, 48), 1, (2, kv_heads), 16)
    kept = dropped(*tensors[:2], probability, causal, 16)
    share = kept.mean().item() if not causal else kept.tril().sum().item() / (2 * 48 * 49 / 2)
    assert share == pytest.approx(1 - probability, abs=0.03)

    def attend(*heads):
        torch.manual_seed(5)
        return flash_triton.attend(*heads, scale=0.3, causal=causal, dropout=probability)

    exact = round(probability * 65536) / 65536
    double = [tensor.double() for tensor in tensors]
    expected = with_gradients(exact_attend, double, scale=0.3, causal=causal, kept=kept / (1 - exact))
    for actual, wanted in zip(with_gradients(attend, tensors), expected, strict=True):
        assert (actual - wanted).norm() <= ROUNDING * wanted.norm()


@pytest.mark.usefixtures("small_tiles")
def test_dropped_weights_do_not_depend_on_the_tiles(monkeypatch):
    query, key, _ = make_heads((48, 48), 1, (1, 1), 16)
    first = dropped(query, key, 0.5, False, 16)
    monkeypatch.setattr("megatron.kernels.attention.flash.launch._tile", lambda kernel, query: Tile(16, 32, 4, 1))
    assert torch.equal(first, dropped(query, key, 0.5, False, 16))


def test_recompute_drops_the_same_weights():
    def attend(*heads):
        return flash_triton.attend(*heads, scale=0.3, causal=True, dropout=0.4)

    tensors, results = make_heads((40, 40), 1, (2, 2), 16), []
    for run in (attend, lambda *heads: checkpoint(attend, *heads, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(with_gradients(run, tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("budget_bytes", "launches"), [(0, 2), (100_000, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recompute_keeps_the_output_within_its_budget(monkeypatch, dropout, budget_bytes, launches):
    def attend(*heads):
        return torch.sin(flash_triton.attend(*heads, scale=0.3, causal=True, dropout=dropout))

    from megatron.kernels.attention.flash import launch, operator

    calls = []
    monkeypatch.setattr(operator, "launch_forward", lambda *given: calls.append(given) or launch.launch_forward(*given))
    tensors = make_heads((40, 40), 1, (2, 2), 16)
    policy = RecomputePolicy(granularity="products", budget_bytes=budget_bytes)
    torch.manual_seed(3)
    actual = with_gradients(lambda *heads: recompute(attend, *heads, policy=policy), tensors)
    assert len(calls) == launches
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(actual, with_gradients(attend, tensors), strict=True))


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"causal": False}, 40 * 50),
        ({"causal": True}, sum(range(11, 51))),
        ({"causal": True, "window": 30}, sum(min(30, seen) for seen in range(11, 51))),
        ({"causal": True, "window": 500}, sum(range(11, 51))),
    ],
)
def test_flops_are_those_of_what_is_seen(options, pairs):
    tensors = make_heads((40, 50), 2, (4, 2), 16)
    with FlopCounterMode(display=False) as counter:
        output = TRITON.attend(*tensors, scale=0.3, dropout=0.0, **options)
    assert counter.get_total_flops() == 4 * pairs * 2 * 4 * 16
    with counter:
        output.sum().backward()
    assert counter.get_total_flops() == 10 * pairs * 2 * 4 * 16


def test_two_runs_give_the_same_bits():
    tensors = make_heads((50, 50), 1, (4, 1), 16)
    runs = [with_gradients(TRITON.attend, tensors, scale=0.3, causal=True, dropout=0.0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_heads_of_a_fused_product_are_read_in_place():
    from megatron.kernels.attention.flash.launch import addressable

    product = torch.randn(40, 2, 2, 3, 16)
    tensors = list(product.unbind(3))
    assert all(addressable(tensor) is tensor for tensor in tensors)
    assert max(errors(TRITON, tensors, scale=0.3, causal=True)) < ROUNDING


def test_a_gradient_without_memory_of_its_own_is_copied():
    tensors = make_heads((40, 40), 1, (2, 2), 16)
    grads = torch.autograd.grad(TRITON.attend(*tensors, scale=0.3, causal=True, dropout=0.0).sum(), tensors)
    expected = torch.autograd.grad(exact_attend(*tensors, scale=0.3, causal=True).sum(), tensors)
    torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-5)


def test_operators_keep_the_promises_of_their_shapes():
    from megatron.kernels.attention.flash.operator import flash_forward

    arguments = (
        *make_heads((20, 20), 2, (2, 1), 16),
        document_bounds(make_ids(2, 20, 3)),
        None,
        0.3,
        True,
        0,
        0.0,
        0.0,
    )
    torch.library.opcheck(
        flash_forward, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )


def test_compiled_code_stays_one_graph():
    def attend(query, key, value):
        return TRITON.attend(query * 2, key, value, scale=0.3, causal=True, dropout=0.0) + 1

    tensors = make_heads((20, 20), 2, (2, 1), 16)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, tensors), with_gradients(attend, tensors))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, "takes no mask"),
        ({"window": 3, "causal": False}, "needs causal attention"),
        ({"scale": -1.0}, "positive number, not -1"),
        ({"documents": torch.zeros(2, 2, 9, dtype=torch.int32)}, r"bounds are \[1, 2, 9\]"),
    ],
)
def test_what_the_kernels_cannot_do_is_an_error(options, reason):
    with pytest.raises(ValueError, match=reason):
        flash_triton.attend(
            *make_heads((9, 9), 1, (2, 2), 16), **{"scale": 0.3, "causal": True, "dropout": 0.0, **options}
        )
