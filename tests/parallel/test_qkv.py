import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron.config.errors import ConfigError
from megatron.parallel.groups import Group
from megatron.parallel.qkv import QueryKeyValueLinear, exchange_parts
from megatron.parallel.sharding import describe_sharding, join_shards, sharding_of, slice_of
from tests.parallel.logical import assert_matches_dense, fill, logical, tensor_group
from tests.ranks import run_on_ranks

BOTH_LAYOUTS = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole_sequence", "sequence_shards"])
HEADS = {"query_heads": 8, "head_size": 2, "bias": True}


def attend(query_sbnd, key_sbkd, value_sbkd):
    """Causal grouped attention by torch."""
    copies = query_sbnd.shape[2] // key_sbkd.shape[2]
    heads = [query_sbnd, *(x.repeat_interleave(copies, dim=2) for x in (key_sbkd, value_sbkd))]
    return F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in heads), is_causal=True).permute(2, 0, 1, 3)


class GroupedAttention(nn.Module):
    def __init__(self, key_value_heads, group, sequence_parallel=False):
        super().__init__()
        layout = {"group": group, "sequence_parallel": sequence_parallel}
        self.qkv = QueryKeyValueLinear(4, key_value_heads=key_value_heads, **HEADS, **layout)

    def forward(self, hidden):
        query, key, value = self.qkv(hidden)
        # Not linear in the key: attention alone leaves its bias without a gradient.
        return attend(query, key.tanh(), value).flatten(2)


def grouped_attention_matches_dense(key_value_heads, sequence_parallel):
    group = tensor_group()
    layer = GroupedAttention(key_value_heads, group, sequence_parallel)
    dense = GroupedAttention(key_value_heads, Group.alone())
    dim = 0 if sequence_parallel else None
    assert_matches_dense(layer, dense, logical(9, 4, 3, 4), group, input_dim=dim, output_dim=-1)


def squared_norm_as_engines_count_it(key_value_heads):
    """Tagged parameters count on every tensor rank, the others on the first."""
    group = tensor_group()
    layer, dense = GroupedAttention(key_value_heads, group), GroupedAttention(key_value_heads, Group.alone())
    for module in (layer, dense):
        fill(module)(logical(9, 4, 3, 4)).sum().backward()
    counted = [p for p in layer.parameters() if getattr(p, "tensor_model_parallel", False) or group.rank == 0]
    squares = torch.stack([p.grad.square().sum() for p in counted]).sum()
    dist.all_reduce(squares)
    return squares.item(), sum(p.grad.square().sum().item() for p in dense.parameters())


def shards_of_weight(key_value_heads):
    layer = fill(QueryKeyValueLinear(4, key_value_heads=key_value_heads, **HEADS, group=tensor_group()))
    return layer.weight.detach(), sharding_of(layer.weight)


def gradient_of_exchanged_parts():
    group = tensor_group()
    part = logical(group.rank, 3, 2).requires_grad_()
    whole = exchange_parts(part, group, sharers=2)
    (whole * (group.rank + 1)).sum().backward()
    return whole.detach(), part.grad


@BOTH_LAYOUTS
@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_a_key_value_head_for_every_rank_or_one_for_both_matches_dense(key_value_heads, sequence_parallel):
    run_on_ranks(2, grouped_attention_matches_dense, key_value_heads, sequence_parallel)


@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_key_value_heads_shared_by_some_of_four_ranks_match_dense(key_value_heads):
    run_on_ranks(4, grouped_attention_matches_dense, key_value_heads, False)


def test_a_shared_key_value_head_counts_once_in_the_gradient_norm():
    for counted, dense in run_on_ranks(4, squared_norm_as_engines_count_it, 2):
        assert counted == pytest.approx(dense, rel=1e-5)


def test_shards_of_shared_heads_reassemble_to_the_logical_weight():
    shards, shardings = zip(*run_on_ranks(4, shards_of_weight, 2), strict=True)
    whole = logical(0, 24, 4)
    assert torch.equal(join_shards(shards, shardings[0]), whole)
    assert all(torch.equal(slice_of(whole, sharding), shard) for shard, sharding in zip(shards, shardings, strict=True))


def test_a_part_gets_the_sum_of_its_neighbours_gradients():
    results = run_on_ranks(4, gradient_of_exchanged_parts)
    parts = [logical(rank, 3, 2) for rank in range(4)]
    for rank, (whole, grad) in enumerate(results):
        first = rank // 2 * 2
        assert torch.equal(whole, torch.cat(parts[first : first + 2], dim=-1))
        assert torch.equal(grad, torch.full((3, 2), float(2 * first + 3)))


def test_on_one_rank_it_is_a_linear_layer_whose_output_is_cut_by_groups():
    layer = fill(QueryKeyValueLinear(4, key_value_heads=2, **HEADS, group=Group.alone()))
    hidden = logical(9, 5, 3, 4)
    groups = F.linear(hidden, layer.weight, layer.bias).view(5, 3, 2, 6, 2)
    query, key, value = layer(hidden)
    assert torch.equal(query.view(5, 3, 2, 4, 2), groups[:, :, :, :4])
    assert torch.equal(key, groups[:, :, :, 4])
    assert torch.equal(value, groups[:, :, :, 5])


def test_names_and_logical_shapes_do_not_depend_on_the_number_of_ranks():
    def shapes(ranks):
        group = Group(ranks=tuple(range(ranks)), rank=0, handle=None)
        layer = QueryKeyValueLinear(4, key_value_heads=2, **HEADS, group=group)
        return {name: sharding.logical_shape for name, sharding in describe_sharding(layer).items()}

    assert shapes(1) == shapes(2) == shapes(4) == shapes(8) == {"weight": (24, 4), "bias": (24,)}


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "sentence"),
    [
        (4, 6, 2, "--num-attention-heads 6 cannot be divided over 4"),
        (4, 12, 3, "--num-key-value-heads 3 and --tensor-model-parallel-size 4: one must divide the other"),
        (8, 8, 1, "--kv-channels 2: the 4 key and value rows of a head cannot be divided over the 8 ranks"),
    ],
)
def test_heads_that_cannot_be_spread_evenly_are_refused(ranks, heads, kv_heads, sentence):
    group = Group(ranks=tuple(range(ranks)), rank=0, handle=None)
    with pytest.raises(ConfigError, match=sentence):
        QueryKeyValueLinear(4, query_heads=heads, key_value_heads=kv_heads, head_size=2, bias=False, group=group)
