import pytest
import torch
from torch import nn

from megatron.config.errors import ConfigError
from megatron.parallel.embedding import SequenceShardedPositions, VocabParallelEmbedding
from megatron.parallel.groups import Group
from megatron.parallel.sharding import describe_sharding, init_of
from tests.parallel.logical import assert_matches_dense, device, fill, logical, tensor_group
from tests.ranks import run_on_ranks

BOTH_LAYOUTS = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole_sequence", "sequence_shards"])
TOKENS_BS = torch.tensor([[0, 5, 6, 3], [9, 5, 5, 1], [2, 4, 0, 0]])


class PlainEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, tokens_bs):
        return self.table(tokens_bs).transpose(0, 1)


class PlainPositions(nn.Module):
    def __init__(self, position_ids_bs):
        super().__init__()
        self.position_ids_bs = position_ids_bs
        self.table = nn.Embedding(8, 4)

    def forward(self, hidden):
        return hidden + self.table(self.position_ids_bs).transpose(0, 1)


class GivenPositions(nn.Module):
    def __init__(self, position_ids_bs, group, sequence_parallel, offset=0):
        super().__init__()
        self.position_ids_bs = position_ids_bs
        self.offset = offset
        self.positions = SequenceShardedPositions(8, 4, group=group, sequence_parallel=sequence_parallel)

    def forward(self, hidden):
        return self.positions(hidden, self.position_ids_bs, self.offset)


def embedding_matches_dense(sequence_parallel):
    group = tensor_group()
    layer = VocabParallelEmbedding(10, 4, vocab_size=10, group=group, sequence_parallel=sequence_parallel)
    output_dim = 0 if sequence_parallel else None
    assert_matches_dense(layer, PlainEmbedding(), TOKENS_BS.to(device()), group, output_dim=output_dim)


def positions_match_dense(sequence_parallel):
    group = tensor_group()
    dim = 0 if sequence_parallel else None
    ids_bs = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 7, 2]], device="cpu").to(device())
    for length, offset, given_bs in ((8, 0, None), (4, 0, None), (4, 3, None), (4, 0, ids_bs)):
        layer = GivenPositions(given_bs, group, sequence_parallel, offset)
        counted_bs = torch.arange(offset, offset + length).expand(3, length)
        dense = PlainPositions(counted_bs if given_bs is None else given_bs)
        assert_matches_dense(layer, dense, logical(9, length, 3, 4), group, input_dim=dim, output_dim=dim)


def look_up_position(position):
    layer = fill(SequenceShardedPositions(8, 4, group=tensor_group()))
    return layer(torch.zeros(1, 1, 4), torch.tensor([[position]]))


@BOTH_LAYOUTS
def test_vocab_parallel_embedding_matches_dense(sequence_parallel):
    run_on_ranks(2, embedding_matches_dense, sequence_parallel)


@BOTH_LAYOUTS
def test_positions_whose_rows_are_spread_over_ranks_match_dense(sequence_parallel):
    run_on_ranks(2, positions_match_dense, sequence_parallel)


def test_spread_positions_of_a_whole_sequence_of_shards_need_no_communication():
    shard = Group(ranks=(0, 1), rank=1, handle=None)
    layer = fill(SequenceShardedPositions(8, 4, group=shard, sequence_parallel=True))
    assert torch.equal(layer(torch.zeros(4, 1, 4)).squeeze(1), logical(0, 8, 4)[4:])


def test_spread_positions_are_a_plain_table_of_rows():
    spread = SequenceShardedPositions(8, 4, group=Group(ranks=(0, 1), rank=1, handle=None))
    whole = SequenceShardedPositions(8, 4, group=Group.alone())
    for layer in (spread, whole):
        assert {name: s.logical_shape for name, s in describe_sharding(layer).items()} == {"weight": (8, 4)}
        assert init_of(layer.weight) == "normal"
    assert torch.equal(fill(spread).weight, fill(whole).weight[4:])


def test_a_position_outside_of_a_spread_table_is_an_error_as_in_the_plain_one():
    with pytest.raises(AssertionError, match=r"rank 1.*\n(.*\n)*.*index out of range"):
        run_on_ranks(2, look_up_position, 8)


def test_rows_that_the_ranks_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="--max-position-embeddings 9 cannot be divided over 2 tensor-parallel ranks"):
        SequenceShardedPositions(9, 4, group=Group(ranks=(0, 1), rank=0, handle=None))


def test_embedding_on_a_group_of_one_is_the_plain_embedding():
    layer = VocabParallelEmbedding(10, 4, vocab_size=10, group=Group.alone())
    assert_matches_dense(layer, PlainEmbedding(), TOKENS_BS, Group.alone())


def test_positions_continue_at_the_offset_of_a_cache():
    positions = fill(SequenceShardedPositions(8, 4, group=Group.alone()))
    hidden = logical(9, 6, 3, 4)
    assert torch.equal(positions(hidden)[4:], positions(hidden[4:], offset=4))


def test_a_sequence_longer_than_the_table_is_refused():
    positions = SequenceShardedPositions(8, 4, group=Group.alone())
    with pytest.raises(ConfigError, match="a sequence of 9 tokens exceeds --max-position-embeddings 8"):
        positions(torch.ones(9, 1, 4))


def test_a_vocabulary_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="padded vocabulary size 9 cannot be divided over 2"):
        VocabParallelEmbedding(9, 4, vocab_size=9, group=Group(ranks=(0, 1), rank=0, handle=None))
