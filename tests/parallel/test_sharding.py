import dataclasses

import pytest
import torch
from torch import nn

from megatron.config.errors import ConfigError
from megatron.parallel.embedding import VocabParallelEmbedding
from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.sharding import (
    Sharding,
    describe_sharding,
    divide,
    init_of,
    join_shards,
    mark_init,
    slice_of,
)
from tests.parallel.logical import logical

SECOND_OF_TWO = Group(ranks=(4, 5), rank=1, handle=None)


def layers(group: Group) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "words": VocabParallelEmbedding(10, 4, vocab_size=9, group=group),
            "gate_up": ColumnParallelLinear(4, 8, bias=True, blocks=2, group=group),
            "down": RowParallelLinear(4, 6, bias=True, group=group, init="scaled_normal"),
        }
    )


def test_every_parameter_says_which_part_of_which_logical_tensor_it_is():
    two = {"num_shards": 2, "rank": 1}
    assert describe_sharding(layers(SECOND_OF_TWO)) == {
        "words.weight": Sharding(logical_shape=(10, 4), dim=0, padding=1, **two),
        "gate_up.weight": Sharding(logical_shape=(8, 4), dim=0, blocks=(1, 1), **two),
        "gate_up.bias": Sharding(logical_shape=(8,), dim=0, blocks=(1, 1), **two),
        "down.weight": Sharding(logical_shape=(6, 4), dim=1, **two),
        "down.bias": Sharding(logical_shape=(6,), dim=None),
    }


def test_names_and_logical_shapes_do_not_depend_on_the_layout():
    def shapes(group):
        return {name: sharding.logical_shape for name, sharding in describe_sharding(layers(group)).items()}

    assert shapes(SECOND_OF_TWO) == shapes(Group.alone())


def test_parameters_have_the_shape_of_their_slice():
    module = layers(SECOND_OF_TWO)
    params = dict(module.named_parameters())
    for name, sharding in describe_sharding(module).items():
        assert slice_of(torch.empty(sharding.logical_shape), sharding).shape == params[name].shape


def test_only_divided_parameters_count_on_every_rank_in_the_gradient_norm():
    def tagged(group):
        return {n for n, p in layers(group).named_parameters() if getattr(p, "tensor_model_parallel", False)}

    assert tagged(SECOND_OF_TWO) == {"words.weight", "gate_up.weight", "gate_up.bias", "down.weight"}
    assert tagged(Group.alone()) == set()


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize(("blocks", "groups"), [((1,), 1), ((1, 1), 1), ((2, 1), 1), ((2, 1), 2), ((1, 2), 4)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_reassemble_to_the_logical_tensor(dim, blocks, groups, ranks):
    whole = logical(0, 48, 24)
    sharding = Sharding(logical_shape=(48, 24), dim=dim, num_shards=ranks, blocks=blocks, groups=groups)
    assert torch.equal(join_shards([slice_of(whole, sharding, rank) for rank in range(ranks)], sharding), whole)


def test_a_rank_holds_its_part_of_each_block():
    rows = torch.arange(8)
    sharding = Sharding(logical_shape=(8,), dim=0, num_shards=2, rank=1, blocks=(1, 1))
    assert slice_of(rows, sharding).tolist() == [2, 3, 6, 7]
    assert slice_of(rows, dataclasses.replace(sharding, blocks=(1,))).tolist() == [4, 5, 6, 7]


def test_ranks_hold_whole_groups_while_there_are_enough_and_then_parts_of_each_block_of_one():
    rows = torch.arange(12)  # two groups of four and two rows
    two = Sharding(logical_shape=(12,), dim=0, num_shards=2, blocks=(2, 1), groups=2)
    four = dataclasses.replace(two, num_shards=4)
    assert [slice_of(rows, two, rank).tolist() for rank in (0, 1)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert [slice_of(rows, four, rank).tolist() for rank in (0, 3)] == [[0, 1, 4], [8, 9, 11]]


def test_groups_and_ranks_that_do_not_divide_one_another_are_refused():
    with pytest.raises(ValueError, match="2 groups and 3 ranks do not divide one another"):
        slice_of(torch.ones(12), Sharding(logical_shape=(12,), dim=0, num_shards=3, groups=2))


def test_a_tensor_of_another_shape_is_not_sliced():
    with pytest.raises(ValueError, match=r"\(4, 2\) cannot be sliced"):
        slice_of(torch.ones(4, 2), Sharding(logical_shape=(2, 4), dim=0, num_shards=2))


def test_every_parameter_says_how_it_starts():
    kinds = {name: init_of(param) for name, param in layers(Group.alone()).named_parameters()}
    assert kinds == {
        "words.weight": "normal",
        "gate_up.weight": "normal",
        "gate_up.bias": "zeros",
        "down.weight": "scaled_normal",
        "down.bias": "zeros",
    }


def test_a_parameter_that_does_not_say_how_it_starts_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\) does not say how it starts"):
        init_of(nn.Parameter(torch.ones(3)))


def test_an_unknown_kind_of_start_is_refused():
    with pytest.raises(ValueError, match="'xavier' is none of normal"):
        mark_init(nn.Parameter(torch.ones(3)), "xavier")


def test_fewer_key_value_groups_than_ranks_are_refused():
    with pytest.raises(ConfigError, match="--num-key-value-heads 1 cannot be divided over 2 tensor-parallel ranks"):
        divide(1, SECOND_OF_TWO, "--num-key-value-heads")
