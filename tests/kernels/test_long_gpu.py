"""Kernels on tensors of more than 2^31 elements: the last rows are those that the same rows alone give.

A million tokens of 8192 channels are 2^33 elements, four times what 32 bits count. Gradients are zero but in the last
rows, so that weights' gradients too are those of these rows alone.
"""

import pytest
import torch

from megatron.kernels.activation import fused_activation
from megatron.kernels.attention.interface import AttentionBackend
from megatron.kernels.cross_entropy import FusedSoftmax
from megatron.kernels.dropout import KEY_RANGE, fused_dropout_add
from megatron.kernels.norm import fused_add_norm, fused_norm
from megatron.kernels.philox import drop_threshold, keep_factors
from megatron.kernels.registry import find_implementations
from megatron.kernels.rotary import fused_rotary, fused_split
from megatron.kernels.softmax import fused_scaled_softmax
from megatron.parallel.cross_entropy import token_losses

pytestmark = pytest.mark.gpu

LIMIT = 2**31
LAST = 64
"""Rows that are compared; all before them lie where 32 bits still count."""
MILLION = 2**20
BACKENDS = find_implementations("megatron.kernels.attention", AttentionBackend)


@pytest.fixture(autouse=True)
def _memory():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("tensors of more than 2^31 elements need 60 GiB of free memory")
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def compare_last_rows(function, x, *weights):
    """Hold results and gradients of the last rows of `x`, and the gradients of `weights`, against these rows alone."""
    assert x.numel() > LIMIT
    found = []
    for rows in (x, x[-LAST:].clone()):
        rows.requires_grad_()
        leaves = [weight.detach().clone().requires_grad_() for weight in weights]
        result = function(rows, *leaves)
        grad = torch.zeros_like(result)
        generator = torch.Generator(device="cuda").manual_seed(1)
        grad[-LAST:] = torch.randn(grad[-LAST:].shape, device="cuda", dtype=grad.dtype, generator=generator)
        grads = torch.autograd.grad(result, [rows, *leaves], grad)
        found.append([result[-LAST:].detach(), grads[0][-LAST:], *grads[1:]])
        assert not grads[0][:-LAST].any()
    for whole, alone in zip(*found, strict=True):
        torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("adds", [False, True])
def test_norms(adds):
    def norm(x, weight, bias):
        if adds:
            return fused_add_norm(x, x.detach(), weight, bias, 1e-5)[1]
        return fused_norm(x, weight, bias, 1e-5)

    compare_last_rows(norm, random(MILLION + LAST, 2048), random(2048), random(2048))


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_activations(kind):
    compare_last_rows(lambda x, bias: fused_activation(kind, x, bias), random(2**18 + LAST, 8192), random(8192))


def test_rotated_heads():
    angles = torch.rand(MILLION, 64, device="cuda") * 6

    def split(product):
        table = angles[-len(product) :]
        parts = fused_split(product, table.cos(), table.sin(), groups=8, head_size=128)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    compare_last_rows(split, random(MILLION, 1, 3 * 1024))

    def rotate(heads):
        table = angles[-len(heads) :]
        return fused_rotary(heads, table.cos(), table.sin())

    compare_last_rows(rotate, random(MILLION, 1, 17, 128))


def test_dropout_draws_for_every_place():
    rows, columns, probability = MILLION + LAST, 2048, 0.25
    x = torch.ones(rows, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert x.numel() > LIMIT
    state = torch.cuda.get_rng_state()
    dropped = fused_dropout_add(x, None, probability)
    (grad,) = torch.autograd.grad(dropped, x, torch.ones_like(dropped))
    torch.cuda.set_rng_state(state)
    x_last = x[-LAST:].detach()
    again = fused_dropout_add(x_last, None, probability, first=(rows - LAST) * columns)
    torch.cuda.set_rng_state(state)
    key = torch.randint(KEY_RANGE, (1,), device="cuda")
    expected = keep_factors(x_last.shape, key, (rows - LAST) * columns, drop_threshold(probability)).bfloat16()
    assert torch.equal(again, expected), "the key is drawn in another way than this test thinks"
    assert torch.equal(dropped[-LAST:], expected)
    assert torch.equal(grad[-LAST:], expected)


def test_cross_entropy():
    rows, columns = 43_008, 50_304
    logits = random(rows, columns)
    assert logits.numel() > LIMIT
    labels = torch.randint(columns, (rows,), device="cuda")
    last, softmax = logits[-LAST:].clone(), FusedSoftmax()
    whole = softmax.statistics(logits, labels, columns - 47)
    alone = softmax.statistics(last, labels[-LAST:], columns - 47)
    assert torch.equal(whole[:, -LAST:], alone)
    _, log_sum = token_losses(whole)
    scale = torch.ones(rows, device="cuda")
    softmax.gradient(logits, labels, log_sum, scale, columns - 47)
    softmax.gradient(last, labels[-LAST:], log_sum[:, -LAST:], scale[-LAST:], columns - 47)
    assert torch.equal(logits[-LAST:], last)


def test_softmax_of_scores():
    scores = random(4, 8, 8256, 8256)
    assert scores.numel() > LIMIT
    last = scores[-1:, -1:].clone()
    results = []
    for given in (scores, last):
        given.requires_grad_()
        weights = fused_scaled_softmax(given, scale=0.5, causal=True)
        (grad,) = torch.autograd.grad(weights, given, torch.ones_like(weights) * given.detach())
        results.append((weights[-1, -1].detach(), grad[-1, -1]))
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole, alone)


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_flash", "flash_triton", "flash_v4"])
def test_attention_over_a_million_tokens(name):
    """One head of 17 whose tensors have 2^31 elements and more: its last queries, and what their gradients reach."""
    if reason := BACKENDS[name].unavailable():
        pytest.skip(reason)
    heads, size, scale = 17, 128, 0.2
    query, key, value = (random(MILLION, 1, heads, size) for _ in range(3))
    assert query.numel() > LIMIT
    leaves = [x.requires_grad_() for x in (query, key, value)]
    own = [x[:, :, -1:] for x in leaves]
    output = BACKENDS[name].attend(*own, scale=scale, causal=True, dropout=0.0)
    grad = torch.zeros_like(output)
    grad[-LAST:] = random(LAST, 1, 1, size)
    grads = [x[:, 0, -1].float() for x in torch.autograd.grad(output, leaves, grad)]
    q, k, v = (x.detach()[:, 0, -1].float().requires_grad_() for x in (query, key, value))
    hidden = torch.ones(LAST, MILLION, dtype=torch.bool, device="cuda").triu(MILLION - LAST + 1)
    weights = (q[-LAST:] @ k.t() * scale).masked_fill(hidden, float("-inf")).softmax(dim=-1)
    exact = weights @ v
    expected = torch.autograd.grad(exact, (q, k, v), grad[-LAST:, 0, 0].float())
    pairs = [(output[-LAST:, 0, 0].float(), exact), (grads[0][-LAST:], expected[0][-LAST:])]
    pairs += list(zip(grads[1:], expected[1:], strict=True))
    for number, (actual, right) in enumerate(pairs):
        error = (actual - right).norm() / right.norm()
        assert error < 2e-2, f"tensor {number} of output and gradients is {error:.3g} off"
    assert not grads[0][:-LAST].any()
