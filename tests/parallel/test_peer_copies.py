"""Products whose shards travel as copies, a piece at a time: they are those of whole sequences."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.config.errors import ConfigError
from megatron.parallel import groups
from megatron.parallel.peer_copies import FREE, FULL, PeerCopies
from megatron.parallel.peer_memory import open_peer_memory
from megatron.parallel.shard_products import gathered_product, scattered_product
from tests.emulated_peers import MappedMemory, by_copies, irregular
from tests.model import test_graphed_blocks as graphed_blocks
from tests.model import test_halves as halves
from tests.parallel import test_linear as linear
from tests.parallel import test_qkv as qkv
from tests.parallel.test_linear import Recording
from tests.ranks import run_on_ranks

SHAPES = [(1, 3), (2, 5), (64, 9), (0, 4), (300, 7)]
"""Of shards: parts of a piece, many pieces, and nothing."""


def sums_and_shards_are_those_of_gloo(dtype):
    rank, size = dist.get_rank(), dist.get_world_size()
    copies = PeerCopies(MappedMemory(dist.group.WORLD, irregular(rank)))
    torch.manual_seed(rank)
    for shape in SHAPES:
        shard, summand = (torch.randn(n * shape[0], shape[1]).to(dtype) for n in (1, size))
        whole, mine = torch.full_like(summand, torch.nan), torch.full_like(shard, torch.nan)
        arriving = copies.gather(shard)

        def bring_together(arriving=arriving, whole=whole):
            for place, part in arriving:
                whole[place] = part

        copies.scatter(lambda place, out, summand=summand: out.copy_(summand[place]), mine, bring_together)
        shards, summands = ([torch.empty_like(tensor) for _ in range(size)] for tensor in (shard, summand))
        dist.all_gather(shards, shard)
        dist.all_gather(summands, summand)
        assert torch.equal(whole, torch.cat(shards))
        exact = torch.stack(summands).double().sum(dim=0)[rank * shape[0] :][: shape[0]]
        torch.testing.assert_close(mine.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-7)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_sums_are_right_in_whatever_order_ranks_come(ranks, dtype):
    run_on_ranks(ranks, sums_and_shards_are_those_of_gloo, dtype)


def copies_change_no_number(kind, mlp_chunk_size):
    torch.set_default_dtype(torch.float64)
    for name, policy in halves.POLICIES.items():
        built = {"in_halves": False, "policy": policy, "mlp_chunk_size": mlp_chunk_size, **halves.KINDS[kind]}
        if name != "products":
            found = halves.loss_and_gradients(halves.on_tensor_ranks(**built), 3)
            with mock.patch.object(halves, "create_groups", groups.create_groups):
                expected = halves.loss_and_gradients(halves.on_tensor_ranks(**built), 3)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


CHECKS = [
    (linear.column_matches_dense, True, True),
    (linear.column_matches_dense, False, True, True),
    (linear.row_matches_dense, True, True),
    (linear.gated_mlp_matches_dense, True),
    (qkv.grouped_attention_matches_dense, 1, True),
    (qkv.grouped_attention_matches_dense, 2, True),
    (copies_change_no_number, "gpt2", 0),
    (copies_change_no_number, "one key/value head", 24),
    (graphed_blocks.recorded_tensor_ranks_train_the_same_model, False),
]


def named(check):
    return "-".join(getattr(part, "__name__", str(part)) for part in check)


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_layers_whose_shards_are_copied_match_the_plain_ones(check):
    run_on_ranks(2, by_copies, *check)


class Watched(MappedMemory):
    """Writes down, among the products, what begins to travel, what is there and what is done with."""

    def __init__(self, handle):
        super().__init__(handle)
        self.events = []

    def beside(self, action):
        self.events.append("sends")
        return super().beside(action)

    def tell(self, rank, flag, slot):
        super().tell(rank, flag, slot)
        self.events += ["there is room"] if flag == FREE else []

    def take(self, rank, flag, slot):
        super().take(rank, flag, slot)
        self.events += ["arrived"] if flag == FULL else []


def events_of_products(keep_gathered):
    memory = Watched(dist.group.WORLD)
    copies, recording = PeerCopies(memory), Recording(memory.events)
    shard, weight = torch.ones(2, 1, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    events = []
    with recording:
        gathered = gathered_product(shard, weight, None, copies, keep_gathered=keep_gathered)
        events.append(memory.events.copy())
        scattered = scattered_product(gathered, torch.ones(4, 3), copies)
        events.append(memory.events[len(events[0]) :])
        memory.events.clear()
        gathered.backward(torch.ones_like(gathered))
        events.append(memory.events.copy())
    assert scattered.shape == shard.shape
    return events


def test_a_rank_multiplies_while_shards_travel():
    """Its own shard while others come, and what is for others first, so that it goes while the rest is multiplied."""
    gathers = ["sends", "product", "arrived", "product", "there is room"]
    scatters = ["product", "sends", "product", "arrived", "there is room"]
    gathers_again = ["sends", "product", "sends", "product", "arrived", "there is room", "product", *scatters[-2:]]
    assert run_on_ranks(2, events_of_products, False) == [[gathers, scatters, gathers_again]] * 2
    finds_it_kept = ["product", "sends", "product", "product", *scatters[-2:]]
    assert run_on_ranks(2, events_of_products, True) == [[gathers, scatters, finds_it_kept]] * 2


def on_gpu(check, *args):
    torch.set_default_device("cuda")
    by_copies(check, *args)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_layers_whose_shards_are_copied_match_the_plain_ones_on_gpus(check):
    run_on_ranks(2, on_gpu, *check, backend="nccl")


def products_are_those_of_the_whole_sequence():
    """Of shards of many pieces, many times in a row, and as part of a graph that is repeated among others."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    rank, size, device = (
        dist.get_rank(),
        dist.get_world_size(),
        torch.device("cuda", dist.get_rank() % torch.cuda.device_count()),
    )
    torch.cuda.set_device(device)
    copies = PeerCopies(open_peer_memory(dist.group.WORLD, device))

    def of_all(seed, *shape):
        """What each rank draws, which all know."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn((size, *shape), generator=generator, device=device, dtype=torch.bfloat16)

    ups, downs = of_all(1, 64, 2048) / 45, of_all(2, 2048, 64) / 8
    shard, found = torch.empty(40_000, 2048, device=device, dtype=torch.bfloat16), {}

    def multiply():
        found["inner"] = gathered_product(shard.unsqueeze(1), ups[rank], None, copies).squeeze(1)
        found["sum"] = scattered_product(found["inner"].unsqueeze(1), downs[rank], copies).squeeze(1)

    def draw_and_check(seed, work):
        shards = of_all(seed, *shard.shape)
        shard.copy_(shards[rank])
        work()
        whole = shards.flatten(0, 1)
        own = slice(rank * shard.shape[0], (rank + 1) * shard.shape[0])
        summands = [(whole[own] @ up.t() @ down.t()).float() for up, down in zip(ups, downs, strict=True)]
        for name, exact in (("inner", whole @ ups[rank].t()), ("sum", sum(summands))):
            error = (found[name] - exact).abs().max() / exact.abs().max()
            assert error < 0.02, f"{name} of {seed}: {error}"

    with torch.no_grad():
        for seed in range(10, 13):
            draw_and_check(seed, multiply)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            multiply()
        recorded = dict(found)
        for seed in range(20, 26):
            found.update(recorded)
            draw_and_check(seed, graph.replay)
            if seed % 2:
                draw_and_check(seed + 10, multiply)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_products_of_ranks_that_share_a_gpu_are_those_of_the_whole_sequence(ranks):
    """Slowly, as the GPU takes turns with them, but with all that copies are made of."""
    run_on_ranks(ranks, products_are_those_of_the_whole_sequence)


@pytest.mark.gpu(2)
def test_products_of_two_gpus_are_those_of_the_whole_sequence():
    run_on_ranks(2, products_are_those_of_the_whole_sequence, backend="nccl")


def test_a_cpu_has_no_copy_engines():
    with pytest.raises(ConfigError, match=r"--tp-comm-overlap copies needs .* computes on a cpu: use --tp-comm-over"):
        open_peer_memory(None, torch.device("cpu"))
