"""The operators around the kernels of flash-attn-4 on a CUDA device: what they promise to torch, and what that does."""

import functools

import pytest
import torch

from megatron.kernels.attention import flash_v4
from megatron.parallel.recompute import RecomputePolicy, recompute
from tests.kernels.exact_attention import make_ids, with_gradients
from tests.kernels.test_flash_gpu import OPTIONS, on_gpu, usable

pytestmark = pytest.mark.gpu

LENGTH = 700


@pytest.fixture(params=[0, 9], ids=lambda documents: f"{documents} documents")
def documents(request):
    backend = usable("flash_v4", documents=bool(request.param), gqa=True)
    return backend.prepare_documents(make_ids(2, LENGTH, request.param, device="cuda")) if request.param else None


@pytest.fixture
def same_bits():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_results_are_laid_out_as_promised(documents):
    heads = [tensor.transpose(0, 1) for tensor in on_gpu((LENGTH, LENGTH), 2, (4, 2), 64)]
    if documents is not None:
        heads = [tensor.detach().flatten(0, 1).requires_grad_() for tensor in heads]
    arguments = (*heads, None if documents is None else documents.offsets, 2, 0.1, True, 33, 0.7, False)
    operators = torch.ops.megatron
    torch.library.opcheck(operators.flash_v4_forward.default, arguments, test_utils=("test_schema", "test_faketensor"))
    with torch.no_grad():
        output, log_sums = operators.flash_v4_forward(*arguments)
    backward = (torch.randn_like(output), *arguments[:3], output, log_sums, *arguments[3:])
    torch.library.opcheck(operators.flash_v4_backward.default, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("same_bits")
@pytest.mark.parametrize(("budget_bytes", "launches"), [(0, 2), (2**30, 1)])
def test_recompute_keeps_the_output_within_its_budget(monkeypatch, documents, budget_bytes, launches):
    from flash_attn.cute import interface

    calls = []
    forward = interface._flash_attn_fwd

    @functools.wraps(forward)  # which takes what it has compiled along: it looks for that under its own name
    def noted(**options):
        calls.append(options)
        return forward(**options)

    monkeypatch.setattr(interface, "_flash_attn_fwd", noted)

    def attend(*heads):
        return torch.sin(flash_v4.attend(*heads, dropout=0.0, documents=documents, **OPTIONS) * 2)

    tensors = on_gpu((LENGTH, LENGTH), 2, (4, 2), 64)
    policy = RecomputePolicy(granularity="products", budget_bytes=budget_bytes)
    actual = with_gradients(lambda *heads: recompute(attend, *heads, policy=policy), tensors)
    assert len(calls) == launches
    assert all(torch.equal(a, b) for a, b in zip(actual, with_gradients(attend, tensors), strict=True))


def test_one_graph_serves_whatever_the_documents():
    backend = usable("flash_v4", documents=True, gqa=True)

    def attend(*heads, documents):
        return backend.attend(*heads, dropout=0.0, documents=documents, **OPTIONS) * 3

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    tensors = on_gpu((LENGTH, LENGTH), 2, (4, 2), 64)
    for seed in range(3):
        documents = backend.prepare_documents(make_ids(2, LENGTH, 9, seed, device="cuda"))
        expected = with_gradients(attend, tensors, documents=documents)
        for a, e in zip(with_gradients(compiled, tensors, documents=documents), expected, strict=True):
            assert (a.float() - e.float()).norm() <= 1e-2 * e.float().norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
