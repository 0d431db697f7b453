from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron.parallel import recompute_inputs
from megatron.parallel.collectives import copy_to_group, reduce_from_group
from megatron.parallel.groups import Group
from megatron.parallel.random import rank_stream
from megatron.parallel.recompute import FULL, RecomputePolicy, recompute
from tests.parallel.logical import logical, own, tensor_group
from tests.ranks import run_on_ranks


def block(hidden, weights, group):
    """A column and a row product on hidden states that all ranks have alike, dropout in both kinds of streams."""
    inner = copy_to_group(hidden, group) @ own(weights[0], group, 1)
    with rank_stream(group, hidden.device):
        inner = F.dropout(torch.tanh(inner), 0.5)
    return hidden + F.dropout(reduce_from_group(inner @ own(weights[1], group, 0), group), 0.5)


def outcome(run, group):
    torch.manual_seed(1)
    hidden = logical(5, 3, 1, 7).requires_grad_()  # 21 elements: two ranks' shares differ in length
    weights = logical(3, 7, 4).requires_grad_(), logical(4, 4, 7).requires_grad_()
    output = torch.sin(hidden)
    for _ in range(3):
        output = run(block, output, weights, group)
    output.square().sum().backward()
    return [output.detach(), hidden.grad, *(weight.grad for weight in weights), torch.rand(4)]


def splitting_changes_nothing():
    group = tensor_group()
    plain = outcome(lambda function, *args: function(*args), group)
    for on_host in (False, True):
        policy = RecomputePolicy(granularity="full", split_over=group, on_host=on_host)
        for expected, actual in zip(plain, outcome(partial(recompute, policy=policy), group), strict=True):
            assert torch.equal(expected, actual)


def elements_kept(policy):
    """Elements of an input of 21 that are still in memory when nobody else needs it: all of them, or the shares."""
    share_sizes = []
    with patched(recompute_inputs, "_own_share", lambda share: share_sizes.append(share.numel())):
        hidden = logical(5, 3, 1, 7).requires_grad_() * 1
        storage = hidden.untyped_storage()._weak_ref()
        output = recompute(torch.sin, hidden, policy=policy)
        del hidden
        whole_is_kept = not torch.UntypedStorage._expired(storage)
    assert output.requires_grad
    return 21 if whole_is_kept else sum(share_sizes)


@contextmanager
def patched(module, name, see):
    """Show what a function of the module returns."""
    function = getattr(module, name)

    def shown(*args):
        result = function(*args)
        see(result)
        return result

    setattr(module, name, shown)
    try:
        yield
    finally:
        setattr(module, name, function)


def elements_kept_with_and_without_splitting():
    split = RecomputePolicy(granularity="full", split_over=tensor_group())
    return elements_kept(FULL), elements_kept(split)


def bytes_kept_on_device(policy):
    """Device memory that waits for backward of eight units of 4 MiB input each, in units of one input."""
    hidden = torch.ones(1024, 1, 1024, requires_grad=True)
    torch.cuda.synchronize()
    before, output = torch.cuda.memory_allocated(), hidden
    for _ in range(8):
        output = recompute(torch.sin, output * 1, policy=policy)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    output.sum().backward()
    return round(kept / hidden.nbytes, 1)


def on_gpu():
    torch.set_default_device("cuda")
    splitting_changes_nothing()
    policies = [FULL, RecomputePolicy(granularity="full", split_over=tensor_group())]
    return [bytes_kept_on_device(policy) for policy in policies]


def test_inputs_split_over_tensor_ranks_change_neither_gradients_nor_later_draws():
    run_on_ranks(2, splitting_changes_nothing)


def test_a_rank_keeps_its_share_of_an_input():
    assert run_on_ranks(2, elements_kept_with_and_without_splitting) == [(21, 11)] * 2


def test_weights_and_integers_stay_where_they_are():
    policy = RecomputePolicy(granularity="full", split_over=Group(ranks=(0, 1), rank=0, handle=None))
    moved = []
    with patched(recompute_inputs, "_own_share", lambda share: moved.append(tuple(share.shape))):
        hidden, weight, rows = torch.ones(3, 7, requires_grad=True), nn.Parameter(torch.ones(7, 4)), torch.arange(3)
        recompute(lambda hidden, weight, rows: hidden[rows] @ weight, hidden * 1, weight, rows, policy=policy)
    assert moved == [(11,)]


class Borrower:
    pass


def test_buffers_are_made_once_and_lent_again_when_their_borrower_is_gone():
    made = []
    buffers = recompute_inputs.Buffers(lambda size: made.append(size) or torch.empty(size, dtype=torch.uint8))
    for _ in range(3):
        borrowers = [Borrower() for _ in range(4)]
        lent = [buffers.lend(size, borrower) for size, borrower in zip((8, 8, 8, 16), borrowers, strict=True)]
        assert len({buffer.data_ptr() for buffer in lent}) == 4
        del borrowers
    assert sorted(made) == [8, 8, 8, 16]


def pinned_for_steps(steps):
    """Buffers that are made for steps of eight units, while the host runs ahead of the device."""
    policy = RecomputePolicy(granularity="full", on_host=True)
    made, transfers = [], recompute_inputs._Transfers.of(torch.device("cuda", torch.cuda.current_device()))
    make = transfers.buffers._make
    transfers.buffers = recompute_inputs.Buffers(lambda size: made.append(size) or make(size))
    hidden, weight = torch.ones(1024, 1, 1024, requires_grad=True), torch.full((1024, 1024), 1e-3)
    for _ in range(steps):
        output, hidden.grad = hidden, None
        for _ in range(8):
            output = recompute(lambda x: torch.sin(x @ weight @ weight @ weight), output * 1, policy=policy)
        output.sum().backward()
    return made, hidden.grad


@pytest.mark.gpu
def test_pinned_memory_is_used_again_and_its_tensors_are_right():
    with torch.device("cuda"):
        (once, expected), (many, found) = pinned_for_steps(1), pinned_for_steps(6)
    assert once == many == [4 * 2**20] * 8
    assert torch.equal(expected, found)


@pytest.mark.gpu
def test_inputs_on_the_host_take_no_memory_of_the_device():
    with torch.device("cuda"):
        on_device = bytes_kept_on_device(FULL)
        assert on_device == 9.0  # eight inputs and the output
        assert bytes_kept_on_device(RecomputePolicy(granularity="full", on_host=True)) == 1.0


@pytest.mark.gpu(2)
def test_inputs_split_over_gpus_change_no_gradient_and_take_half_the_memory():
    assert run_on_ranks(2, on_gpu, backend="nccl") == [[9.0, 5.0]] * 2
