import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron.parallel import collectives
from megatron.parallel.gradient_sums import sum_gradients
from megatron.parallel.groups import Group
from tests.parallel.logical import assert_matches_dense, logical, tensor_group
from tests.ranks import run_on_ranks

PAIRS = [
    ("copy_to_group", "reduce_from_group", {}),
    ("gather_dim", "split_dim", {"dim": 0}),
    ("gather_dim", "split_dim", {"dim": 1}),
    ("gather_dim", "split_dim", {"dim": -1}),
    ("all_gather_sequence", "reduce_scatter_sequence", {}),
]
ALL = list(dict.fromkeys(name for pair in PAIRS for name in pair[:2]))


def backward_is_the_conjugates_forward():
    group = tensor_group()
    for pair in PAIRS:
        for name, conjugate in (pair[:2], pair[1::-1]):
            x = logical(group.rank, 4, 6, 2).requires_grad_()
            output = getattr(collectives, name)(x, group, **pair[2])
            upstream = logical(10 + group.rank, *output.shape)
            output.backward(upstream)
            assert torch.equal(x.grad, getattr(collectives, conjugate)(upstream, group, **pair[2])), name


def forward_is_what_it_says():
    group = tensor_group()
    each = [logical(rank, 4, 6, 2) for rank in range(group.size)]
    mine = each[group.rank]
    expected = {
        "copy_to_group": mine,
        "reduce_from_group": sum(each),
        "gather_dim": torch.cat(each, dim=-1),
        "split_dim": mine[..., group.rank : group.rank + 1],
        "all_gather_sequence": torch.cat(each, dim=0),
        "reduce_scatter_sequence": sum(each).chunk(group.size)[group.rank],
    }
    for name, output in expected.items():
        torch.testing.assert_close(getattr(collectives, name)(mine, group), output)


def the_gradient_of_another_branch_stays_as_it_is():
    group = tensor_group()
    x = torch.ones(2, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    (collectives.copy_to_group(x, group) + other).sum().backward()
    return x.grad.tolist(), other.grad.tolist()


class NormOfShard(nn.Module):
    """A norm whose replicated weight and bias see one shard of the sequence."""

    def __init__(self, group):
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(4))
        self.bias = nn.Parameter(torch.empty(4))

    def forward(self, hidden):
        return F.layer_norm(hidden, (4,), *sum_gradients((self.weight, self.bias), self.group))


def norm_matches_dense():
    group = tensor_group()
    assert_matches_dense(NormOfShard(group), nn.LayerNorm(4), logical(7, 6, 2, 4), group, input_dim=0, output_dim=0)


def splits_unevenly():
    collectives.split_dim(torch.ones(3), tensor_group())


def test_backward_is_the_conjugates_forward():
    run_on_ranks(2, backward_is_the_conjugates_forward)


def test_forward_moves_and_sums_as_documented():
    run_on_ranks(2, forward_is_what_it_says)


def test_backward_does_not_write_into_a_gradient_that_another_branch_receives():
    assert run_on_ranks(2, the_gradient_of_another_branch_stays_as_it_is) == [([2.0, 2.0], [1.0, 1.0])] * 2


def test_norm_weight_read_on_shards_gets_full_gradient():
    run_on_ranks(2, norm_matches_dense)


@pytest.mark.parametrize("name", ALL)
def test_a_group_of_one_is_the_identity(name):
    assert not dist.is_initialized()
    x = torch.ones(3)
    assert getattr(collectives, name)(x, Group.alone()) is x


def test_a_dimension_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(AssertionError, match=r"shape \(3,\) cannot be divided over 2 ranks"):
        run_on_ranks(2, splits_unevenly)
