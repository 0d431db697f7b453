from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megatron.parallel.collectives import all_gather_sequence, reduce_scatter_sequence
from megatron.parallel.groups import Group
from megatron.parallel.random import rank_stream
from megatron.parallel.recompute import FULL, RecomputePolicy, Unit, recompute
from tests.parallel.logical import logical, tensor_group
from tests.ranks import run_on_ranks

POLICIES = [
    FULL,
    RecomputePolicy(granularity="products", budget_bytes=10_000),
    RecomputePolicy(granularity="full", on_host=True),
    RecomputePolicy(granularity="products", budget_bytes=10_000, on_host=True),
]


def block(hidden, weight, group):
    """Dropout on the ranks' own streams and on the shared one, around a product of the whole sequence."""
    with rank_stream(group, hidden.device):
        hidden = F.dropout(torch.tanh(hidden), 0.5)
    whole = F.dropout(all_gather_sequence(hidden, group) @ weight, 0.5)
    with rank_stream(group, hidden.device):
        return F.dropout(reduce_scatter_sequence(torch.sin(whole), group), 0.5)


def outcome(run, group):
    torch.manual_seed(1)
    hidden = logical(10 + group.rank, 4, 2, 8).requires_grad_()
    weight = logical(3, 8, 8).requires_grad_()
    output = hidden
    for _ in range(3):
        output = run(block, output, weight, group)
    output.square().sum().backward()
    return [output.detach(), hidden.grad, weight.grad, torch.rand(4), torch.rand(4, device="cpu")]


def assert_recompute_changes_nothing(group):
    plain = outcome(lambda function, *args: function(*args), group)
    for policy in POLICIES:
        recomputed = outcome(partial(recompute, policy=policy), group)
        for expected, actual in zip(plain, recomputed, strict=True):
            assert torch.equal(expected, actual), policy


def recompute_changes_nothing_on_ranks():
    assert_recompute_changes_nothing(tensor_group())


def activations_kept(run):
    """Number of tensors kept for backward beside the arguments."""
    kept = []
    hidden, weight = logical(1, 4, 2, 8).requires_grad_(), logical(3, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        run(block, hidden, weight, Group.alone())
    arguments = {hidden.data_ptr(), weight.data_ptr()}
    return len({tensor.data_ptr() for tensor in kept if tensor.numel()} - arguments)


def test_recompute_with_streams_of_single_ranks_inside_changes_neither_gradients_nor_later_draws():
    run_on_ranks(2, recompute_changes_nothing_on_ranks)


def test_recompute_on_a_group_of_one_changes_neither_gradients_nor_later_draws():
    assert_recompute_changes_nothing(Group.alone())


def test_recompute_keeps_no_activation_inside():
    assert activations_kept(lambda function, *args: function(*args)) > 3
    assert activations_kept(recompute) == 0


def test_uniform_recompute_makes_units_of_all_blocks():
    policy = RecomputePolicy(granularity="full", num_layers=2)
    assert policy.units(5) == [Unit(0, 2, True), Unit(2, 4, True), Unit(4, 5, True)]


def test_block_recompute_takes_the_first_blocks_one_by_one_and_keeps_the_others():
    policy = RecomputePolicy(granularity="products", method="block", num_layers=2)
    assert policy.units(5) == [Unit(0, 1, True), Unit(1, 2, True), Unit(2, 5, False)]
    assert policy.units(2) == [Unit(0, 1, True), Unit(1, 2, True)]
    assert policy.units(1) == [Unit(0, 1, True)]


@pytest.mark.parametrize("granularity", ["none", "selective"])
def test_blocks_are_kept_unless_recompute_is_of_blocks(granularity):
    policy = RecomputePolicy(granularity=granularity)
    assert policy.units(3) == [Unit(0, 3, False)]
    assert policy.recomputes_attention == (granularity == "selective")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"granularity": "half"}, "no recompute of granularity 'half'"),
        ({"method": "random"}, "method 'random'"),
        ({"num_layers": 0}, "0 layers"),
        ({"granularity": "full", "budget_bytes": 1}, "'products' alone, not of 'full'"),
        ({"granularity": "selective", "split_over": Group((0, 1), 0, None)}, "differ between tensor ranks"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        RecomputePolicy(**fields)


@pytest.mark.gpu
def test_recompute_replays_the_streams_of_a_device():
    with torch.device("cuda"):
        assert_recompute_changes_nothing(Group.alone())
