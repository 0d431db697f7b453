"""An MLP in chunks: as exact as one of all tokens, with the memory of a chunk. Its layouts are in tests/layouts."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megatron.parallel.chunked_mlp import Activation, chunked_mlp
from megatron.parallel.chunks import SequenceChunks
from megatron.parallel.groups import Group
from megatron.parallel.recompute import recompute
from tests.parallel.logical import logical

HIDDEN, INNER = 32, 64
GELU = partial(F.gelu, approximate="tanh")


def plain(hidden, up, bias, down):
    return F.linear(GELU(F.linear(hidden, up, bias)), down)


def in_chunks(hidden, up, bias, down, size=64):
    chunks = SequenceChunks(group=Group.alone(), size=size)
    return chunked_mlp(hidden, up, bias, down, activation=Activation(function=GELU), chunks=chunks)


def tensors(length, dtype, scale=1):
    hidden, inner = HIDDEN * scale, INNER * scale
    shapes = [(length, 1, hidden), (inner, hidden), (inner,), (hidden, inner)]
    return [logical(seed, *shape).to(dtype) for seed, shape in enumerate(shapes)]


def gradients(mlp, leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = mlp(*leaves)
    output.backward(logical(9, *output.shape).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def errors(found, exact):
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)]


def are_as_exact_as_one_product(length=4096, scale=1):
    leaves = tensors(length, torch.bfloat16, scale)
    exact = gradients(plain, [leaf.double() for leaf in leaves])
    whole, chunked = (errors(gradients(mlp, leaves), exact) for mlp in (plain, in_chunks))
    for mine, theirs in zip(chunked, whole, strict=True):
        assert mine <= 1.05 * theirs < 0.02


def test_gradients_are_summed_over_chunks_as_exactly_as_one_product_sums_them():
    are_as_exact_as_one_product()


@pytest.mark.parametrize("frozen", range(4))
def test_what_wants_no_gradient_gets_none(frozen):
    leaves = [leaf.requires_grad_(index != frozen) for index, leaf in enumerate(tensors(100, torch.float32))]
    in_chunks(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [index == frozen for index in range(4)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = [grad.double() for grad in torch.autograd.grad(plain(*leaves).sum(), wanted)]
    assert max(errors([leaf.grad for leaf in wanted], expected)) < 1e-6


def test_recompute_that_ends_with_an_mlp_does_not_run_it_again():
    calls = []

    def counted(inner):
        calls.append(len(inner))
        return GELU(inner)

    leaves = [leaf.requires_grad_() for leaf in tensors(100, torch.float32)]
    chunks = SequenceChunks(group=Group.alone(), size=64)
    mlp = partial(chunked_mlp, activation=Activation(function=counted), chunks=chunks)
    output = recompute(lambda hidden, *weights: hidden + mlp(hidden.sin(), *weights), leaves[0] * 1, *leaves[1:])
    assert calls == [64, 36]
    output.sum().backward()
    assert calls == [64, 36] * 2  # those of its own backward


@pytest.mark.gpu
def test_chunks_on_a_gpu_are_as_exact_and_take_the_memory_of_one():
    with torch.device("cuda"):
        are_as_exact_as_one_product(8192, scale=8)
        leaves, peaks = tensors(65536, torch.bfloat16, scale=16), []
        for mlp in (plain, partial(in_chunks, size=4096)):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            gradients(mlp, leaves)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    of_hidden = 65536 * 16 * HIDDEN * 2  # what is twice as wide exists three times at least in the plain one
    assert peaks[0] > 6 * of_hidden
    assert peaks[1] < 5 * of_hidden
