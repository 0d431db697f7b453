import pytest
import torch
from torch import nn

from megatron.config.errors import ConfigError
from megatron.parallel.embedding import LearnedPositions, VocabParallelEmbedding
from megatron.parallel.groups import Group
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
    def __init__(self, position_ids_bs, group, sequence_parallel):
        super().__init__()
        self.position_ids_bs = position_ids_bs
        self.positions = LearnedPositions(8, 4, group=group, sequence_parallel=sequence_parallel)

    def forward(self, hidden):
        return self.positions(hidden, self.position_ids_bs)


def embedding_matches_dense(sequence_parallel):
    group = tensor_group()
    layer = VocabParallelEmbedding(10, 4, vocab_size=10, group=group, sequence_parallel=sequence_parallel)
    output_dim = 0 if sequence_parallel else None
    assert_matches_dense(layer, PlainEmbedding(), TOKENS_BS.to(device()), group, output_dim=output_dim)


def positions_match_dense(sequence_parallel):
    group = tensor_group()
    dim = 0 if sequence_parallel else None
    hidden = logical(9, 4, 3, 4)
    counted = LearnedPositions(8, 4, group=group, sequence_parallel=sequence_parallel)
    from_zero = PlainPositions(torch.arange(4).expand(3, 4))
    assert_matches_dense(counted, from_zero, hidden, group, input_dim=dim, output_dim=dim)
    ids_bs = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 1, 2]])
    given = GivenPositions(ids_bs, group, sequence_parallel)
    assert_matches_dense(given, PlainPositions(ids_bs), hidden, group, input_dim=dim, output_dim=dim)


@BOTH_LAYOUTS
def test_vocab_parallel_embedding_matches_dense(sequence_parallel):
    run_on_ranks(2, embedding_matches_dense, sequence_parallel)


@BOTH_LAYOUTS
def test_learned_positions_match_dense_and_get_full_gradient(sequence_parallel):
    run_on_ranks(2, positions_match_dense, sequence_parallel)


def test_embedding_on_a_group_of_one_is_the_plain_embedding():
    layer = VocabParallelEmbedding(10, 4, vocab_size=10, group=Group.alone())
    assert_matches_dense(layer, PlainEmbedding(), TOKENS_BS, Group.alone())


def test_positions_continue_at_the_offset_of_a_cache():
    positions = fill(LearnedPositions(8, 4, group=Group.alone()))
    hidden = logical(9, 6, 3, 4)
    assert torch.equal(positions(hidden)[4:], positions(hidden[4:], offset=4))


def test_a_sequence_longer_than_the_table_is_refused():
    positions = LearnedPositions(8, 4, group=Group.alone())
    with pytest.raises(ConfigError, match="a sequence of 9 tokens exceeds --max-position-embeddings 8"):
        positions(torch.ones(9, 1, 4))


def test_a_vocabulary_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="padded vocabulary size 9 cannot be divided over 2"):
        VocabParallelEmbedding(9, 4, vocab_size=9, group=Group(ranks=(0, 1), rank=0, handle=None))
