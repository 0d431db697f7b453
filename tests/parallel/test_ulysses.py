import pytest
import torch
import torch.distributed as dist

from megatron.config.errors import ConfigError
from megatron.kernels.attention import unfused
from megatron.kernels.attention.documents import document_bounds
from megatron.parallel.groups import Group, create_groups
from megatron.parallel.mesh import Mesh
from megatron.parallel.ulysses import UlyssesAttention, heads_for_sequences, sequence_shard, sequences_for_heads
from tests.parallel.logical import logical, own
from tests.parallel.test_qkv import attend
from tests.ranks import run_on_ranks

PAIR = Group(ranks=(0, 1), rank=1, handle=None)


def ulysses_group():
    return create_groups(Mesh(ulysses=dist.get_world_size()), dist.get_rank()).ulysses


def attention_matches_dense(query_heads, key_value_heads):
    group = ulysses_group()
    heads = (query_heads, key_value_heads, key_value_heads)
    wholes = [logical(seed, 8, 3, count, 4).requires_grad_() for seed, count in enumerate(heads)]
    shards = [own(whole.detach(), group, 0).clone().requires_grad_() for whole in wholes]
    expected = attend(*wholes)
    actual = UlyssesAttention(attend, group)(*shards)
    torch.testing.assert_close(actual, own(expected, group, 0))

    upstream = logical(99, *expected.shape)
    expected.backward(upstream)
    actual.backward(own(upstream, group, 0))
    for whole, shard in zip(wholes, shards, strict=True):
        torch.testing.assert_close(shard.grad, own(whole.grad, group, 0))


def documents_reach_whole_sequences():
    """Attention inside of documents that the shards cut."""
    group = ulysses_group()
    bounds = document_bounds(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 2, 2]]))
    options = {"scale": 0.5, "causal": True, "dropout": 0.0, "documents": bounds, "window": 3}
    wholes = [logical(seed, 8, 2, 4, 4) for seed in range(3)]
    actual = UlyssesAttention(unfused.attend, group)(*(own(whole, group, 0) for whole in wholes), **options)
    torch.testing.assert_close(actual, own(unfused.attend(*wholes, **options), group, 0))


def trades():
    """What each trade gives, the way back, and whether backward of each is the other."""
    group = ulysses_group()
    whole = logical(1, 8, 3, 4, 2)
    shard = own(whole, group, 0).clone().requires_grad_()
    [heads] = sequences_for_heads([shard], group)
    torch.testing.assert_close(heads, own(whole, group, 2))
    back = heads_for_sequences(heads, group)
    assert torch.equal(back, shard)
    upstream = logical(2 + group.rank, *heads.shape)
    (grad,) = torch.autograd.grad(heads, shard, upstream, retain_graph=True)
    assert torch.equal(grad, heads_for_sequences(upstream, group))
    (grad,) = torch.autograd.grad(back, heads, shard.detach())
    assert torch.equal(grad, heads.detach())


def collectives_of_one_attention(value_size):
    group = ulysses_group()
    calls = []
    exchange = dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: (calls.append(args[1].shape[-1]), exchange(*args, **kwargs))
    query, key, value = (torch.ones(2, 1, 2, size) for size in (4, 4, value_size))
    UlyssesAttention(lambda query, key, value: value, group)(query, key, value)
    return calls


@pytest.mark.parametrize(("query_heads", "key_value_heads"), [(4, 4), (4, 2), (4, 1), (6, 3)])
def test_attention_of_sequence_shards_matches_attention_of_the_whole(query_heads, key_value_heads):
    run_on_ranks(2, attention_matches_dense, query_heads, key_value_heads)


@pytest.mark.parametrize(("query_heads", "key_value_heads"), [(8, 2), (12, 6)])
def test_key_value_heads_that_four_ranks_do_not_divide_are_repeated_with_summed_gradients(query_heads, key_value_heads):
    run_on_ranks(4, attention_matches_dense, query_heads, key_value_heads)


def test_documents_and_windows_are_those_of_the_whole_sequence():
    run_on_ranks(2, documents_reach_whole_sequences)


def test_the_trades_undo_each_other_and_backward_of_one_is_the_other():
    run_on_ranks(2, trades)


def test_query_key_and_value_travel_together_where_their_heads_have_one_size():
    assert run_on_ranks(2, collectives_of_one_attention, 4)[0] == [4, 4]
    assert run_on_ranks(2, collectives_of_one_attention, 6)[0] == [4, 4, 6, 6]


def test_on_one_rank_it_is_the_attention_itself():
    tensors = [logical(seed, 5, 2, 3, 4) for seed in range(3)]
    assert torch.equal(UlyssesAttention(attend, Group.alone())(*tensors), attend(*tensors))
    assert heads_for_sequences(tensors[0], Group.alone()) is tensors[0]
    assert sequences_for_heads(tensors, Group.alone()) is tensors


def test_query_heads_that_the_ranks_do_not_divide_are_refused():
    tensors = [torch.ones(4, 1, 3, 2)] * 3
    with pytest.raises(
        ConfigError, match=r"--ds-sequence-parallel-size 2 does not divide the 3 query heads .*--num-att"
    ):
        UlyssesAttention(attend, PAIR)(*tensors)


def test_keys_of_a_cache_are_refused():
    with pytest.raises(ValueError, match="1 queries and 4 keys"):
        UlyssesAttention(attend, PAIR)(torch.ones(1, 1, 2, 2), torch.ones(4, 1, 2, 2), torch.ones(4, 1, 2, 2))


def test_a_shard_says_which_positions_it_holds():
    assert sequence_shard(8, PAIR) == range(4, 8)
    assert sequence_shard(7, Group.alone()) == range(7)


def test_a_sequence_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="--seq-length 7 cannot be divided over --ds-sequence-parallel-size 2"):
        sequence_shard(7, PAIR)
