"""Shards that ranks read out of each other's memory: what arrives is what `torch.distributed` would bring."""

import pytest
import torch
import torch.distributed as dist

from megatron.config.errors import ConfigError
from megatron.parallel.peer_copies import PeerCopies
from megatron.parallel.peer_memory import open_peer_memory
from tests.emulated_peers import MappedMemory, by_copies, irregular
from tests.model import test_graphed_blocks as graphed_blocks
from tests.model import test_halves as halves
from tests.parallel import test_collectives as collectives
from tests.parallel import test_embedding as embedding
from tests.parallel import test_linear as linear
from tests.parallel import test_linear_cross_entropy as linear_cross_entropy
from tests.parallel import test_qkv as qkv
from tests.ranks import run_on_ranks

SHAPES = [(1, 3), (2, 1, 5), (64, 9), (0, 4), (300, 7)]
"""Less than an aligned piece, several pieces of a buffer, and nothing."""


def brings_what_gloo_brings(dtype):
    rank, size = dist.get_rank(), dist.get_world_size()
    copies = PeerCopies(MappedMemory(dist.group.WORLD, irregular(rank)))
    torch.manual_seed(rank)
    for shape in SHAPES:
        shard, summand = (torch.randn(n * shape[0], *shape[1:]).to(dtype) for n in (1, size))
        whole, mine = torch.empty_like(summand), torch.empty_like(shard)
        gathering, summing = copies.all_gather(whole, shard), copies.reduce_scatter(mine, summand)
        gathering.wait()
        summing.wait()
        everything = [torch.empty_like(summand) for _ in range(size)]
        dist.all_gather(everything, summand)
        shards = [torch.empty_like(shard) for _ in range(size)]
        dist.all_gather(shards, shard)
        assert torch.equal(whole, torch.cat(shards))
        exact = torch.stack(everything).float().sum(dim=0).to(dtype)
        assert torch.equal(mine, exact.chunk(size)[rank] if shape[0] else exact)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_bring_what_gloo_brings_in_whatever_order_ranks_come(ranks, dtype):
    run_on_ranks(ranks, brings_what_gloo_brings, dtype)


CHECKS = [
    (collectives.backward_is_the_conjugates_forward,),
    (collectives.forward_is_what_it_says,),
    (linear.column_matches_dense, True, True),
    (linear.column_matches_dense, True, True, True),
    (linear.row_matches_dense, True, True),
    (linear.gated_mlp_matches_dense, True),
    (embedding.embedding_matches_dense, True),
    (qkv.grouped_attention_matches_dense, 2, True),
    (linear_cross_entropy.sharded_is_the_whole, True, 10),
    (halves.halves_change_no_number, "gpt2", 4, 24),
    (graphed_blocks.recorded_tensor_ranks_train_the_same_model, False),
    (graphed_blocks.recorded_tensor_ranks_train_the_same_model, True),
]


def named(check):
    return "-".join(getattr(part, "__name__", str(part)) for part in check)


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_layers_that_copy_shards_match_the_plain_ones(check):
    run_on_ranks(2, by_copies, *check)


def on_gpu(check, *args):
    torch.set_default_device("cuda")
    by_copies(check, *args)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_layers_that_copy_shards_match_the_plain_ones_on_gpus(check):
    run_on_ranks(2, on_gpu, *check, backend="nccl")


def brings_what_nccl_brings():
    """Also what is larger than a buffer, many in a row, and as part of a graph that is repeated among others."""
    rank, device = dist.get_rank(), torch.device("cuda", dist.get_rank())
    copies = PeerCopies(open_peer_memory(dist.group.WORLD, device))
    torch.manual_seed(rank)
    shard, summand = (torch.randn(n, 2**20, device=device, dtype=torch.bfloat16) for n in (45, 90))
    whole, mine = torch.empty_like(summand), torch.empty_like(shard)
    expected, sums = torch.empty_like(whole), torch.empty_like(mine)

    def both():
        gathering, summing = copies.all_gather(whole, shard), copies.reduce_scatter(mine, summand)
        gathering.wait()
        summing.wait()

    def check():
        dist.all_gather_into_tensor(expected, shard)
        dist.reduce_scatter_tensor(sums, summand)
        assert torch.equal(whole, expected)
        assert torch.equal(mine, sums)

    for _ in range(5):
        shard.normal_()
        summand.normal_()
        both()
        check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        both()
        copies.all_gather(whole, shard).wait()  # an odd number of them
    for repetition in range(6):
        shard.normal_()
        summand.normal_()
        graph.replay()
        if repetition % 2:
            both()
        check()
    del graph


@pytest.mark.gpu(2)
def test_copies_bring_what_nccl_brings_in_graphs_too():
    run_on_ranks(2, brings_what_nccl_brings, backend="nccl")


def test_a_cpu_has_no_copy_engines():
    with pytest.raises(ConfigError, match=r"--tp-comm-by-copies needs .* computes on a cpu: leave it out"):
        open_peer_memory(None, torch.device("cpu"))
