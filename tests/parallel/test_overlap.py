from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.overlap import gathered_product, start_gathering, start_scattered_product
from megatron.parallel.qkv import QueryKeyValueLinear
from megatron.parallel.recompute import FULL, RecomputePolicy, recompute
from megatron.parallel.transport import Messages, cut_rows
from tests.parallel.logical import assert_matches_dense, fill, logical, own, tensor_group
from tests.parallel.test_linear import GatedMlp
from tests.ranks import run_on_ranks

RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])
PIECES = pytest.mark.parametrize("piece_bytes", [2**20, 64], ids=["whole_shards", "many_pieces"])
"""A piece of 64 bytes has 4 rows of 4 numbers; a shard of 45 rows then has twelve, in six rounds."""

LENGTH, BATCH = 15, 3


def transport_group(piece_bytes, make=Messages):
    group = tensor_group()
    return replace(group, transport=make(group, piece_bytes=piece_bytes))


def input_of(group, features):
    return logical(9, LENGTH * group.size, BATCH, features)


def column_matches_dense(piece_bytes, bias, make=Messages):
    group = transport_group(piece_bytes, make)
    layer = ColumnParallelLinear(4, 12, bias=bias, group=group, sequence_parallel=True)
    assert_matches_dense(layer, nn.Linear(4, 12, bias=bias), input_of(group, 4), group, input_dim=0, output_dim=-1)


def row_matches_dense(piece_bytes, bias, make=Messages):
    group = transport_group(piece_bytes, make)
    layer = RowParallelLinear(12, 4, bias=bias, group=group, sequence_parallel=True)
    assert_matches_dense(layer, nn.Linear(12, 4, bias=bias), input_of(group, 12), group, input_dim=-1, output_dim=0)


def gated_mlp_matches_dense(piece_bytes, make=Messages):
    group = transport_group(piece_bytes, make)
    assert_matches_dense(
        GatedMlp(group, True), GatedMlp(Group.alone(), True), input_of(group, 4), group, input_dim=0, output_dim=0
    )


def shared_heads_match_dense(piece_bytes, make=Messages):
    """Two key/value heads on four ranks: parts of them are exchanged after the product."""
    group = transport_group(piece_bytes, make)
    kinds = {"query_heads": 4, "key_value_heads": 2, "head_size": 2, "bias": True, "sequence_parallel": True}
    layer = fill(QueryKeyValueLinear(4, group=group, **kinds))
    plain = fill(QueryKeyValueLinear(4, group=replace(group, transport=None), **kinds))
    shard = own(input_of(group, 4), group, 0)
    for found, expected in zip(layer(shard), plain(shard), strict=True):
        torch.testing.assert_close(found, expected)
        found.backward(torch.ones_like(found), retain_graph=True)
        expected.backward(torch.ones_like(expected), retain_graph=True)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


@RANKS
@PIECES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_overlapped_products_match_dense(ranks, piece_bytes, bias):
    run_on_ranks(ranks, column_matches_dense, piece_bytes, bias)
    run_on_ranks(ranks, row_matches_dense, piece_bytes, bias)


@PIECES
def test_an_overlapped_gated_mlp_matches_dense(piece_bytes):
    run_on_ranks(2, gated_mlp_matches_dense, piece_bytes)


@PIECES
def test_heads_that_ranks_share_are_exchanged_after_an_overlapped_product(piece_bytes):
    run_on_ranks(4, shared_heads_match_dense, piece_bytes)


def frozen_weights_pass_gradients_on():
    group = transport_group(64)
    layers = [
        fill(ColumnParallelLinear(4, 12, bias=True, group=group, sequence_parallel=True)),
        fill(RowParallelLinear(12, 4, bias=False, group=group, sequence_parallel=True)),
    ]
    for layer in layers:
        layer.requires_grad_(False)
    shard = own(input_of(group, 4), group, 0).clone().requires_grad_()
    layers[1](layers[0](shard)).square().sum().backward()
    return shard.grad.abs().sum().item() > 0 and all(p.grad is None for layer in layers for p in layer.parameters())


def test_frozen_weights_pass_gradients_on():
    assert run_on_ranks(2, frozen_weights_pass_gradients_on) == [True, True]


def mlp_of(group):
    kinds = {"bias": False, "group": group, "sequence_parallel": True}
    return nn.Sequential(
        fill(ColumnParallelLinear(4, 12, **kinds)), nn.Tanh(), fill(RowParallelLinear(12, 4, **kinds)), nn.Tanh()
    )


def step(run, group):
    """Output and gradients, and how often a piece travelled."""
    mlp, shard = mlp_of(group), own(input_of(group, 4), group, 0).clone().requires_grad_()
    swaps, right = [], group.transport.swap
    group.transport.swap = lambda *args: swaps.append(args[1]) or right(*args)
    output = run(mlp, shard)
    output.square().sum().backward()
    return [output.detach(), shard.grad, *(p.grad for p in mlp.parameters())], len(swaps)


def recompute_changes_nothing(make=Messages):
    """Bit for bit; kept products bring what their collective brought with them."""
    group = transport_group(64, make)
    plain, swaps = step(lambda mlp, shard: mlp(shard), group)
    counts = []
    for policy in (FULL, RecomputePolicy(granularity="products", budget_bytes=2**20)):
        found, count = step(lambda mlp, shard, policy=policy: recompute(mlp, shard, policy=policy), group)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        counts.append(count - swaps)
    return counts


def test_recompute_of_overlapped_products_changes_nothing_and_kept_ones_do_not_travel_again():
    pieces_of_forward = 12 + 12
    assert run_on_ranks(2, recompute_changes_nothing) == [[pieces_of_forward, 0]] * 2


def copies_follow_each_other(make=Messages):
    """Many products one after the other, whose pieces use the same slots again, each with numbers of its own."""
    group = transport_group(4096, make)
    transport = group.transport
    for step in range(20):
        shard = logical(group.rank + 10 * step, 64, 128)
        every = torch.cat([logical(rank + 10 * step, 64, 128) for rank in range(group.size)])
        found, whole = gathered_product(shard, 128, lambda rows, out: out.copy_(rows), transport, keep=bool(step % 2))
        assert torch.equal(found, every)
        assert whole is None or torch.equal(whole, every)
        gathering = start_gathering(shard, transport)
        scattering = start_scattered_product(every, 128, lambda rows, out: out.copy_(rows), transport)
        assert torch.equal(gathering.wait(), every)
        assert torch.equal(scattering.wait(), group.size * shard)


def test_many_products_follow_each_other():
    run_on_ranks(3, copies_follow_each_other)


class Recorded:
    """A transport to a rank that sends back what it gets; writes down what is asked for, in order."""

    name = "recorded"

    def __init__(self, slots, size=2, piece_bytes=8):
        self.group = Group(ranks=tuple(range(size)), rank=0, handle=None)
        self.slots, self.piece_bytes, self.events, self.under_way, self.most = slots, piece_bytes, [], 0, 0

    def swap(self, outgoing, distance, into=None):
        self.events.append("start")
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return Echo(self, outgoing if into is None else into.copy_(outgoing))

    def place(self, source, into):
        into.copy_(source)

    def product(self, rows, out):
        self.events.append("product")
        out.copy_(rows)


class Echo:
    def __init__(self, transport, piece):
        self.transport, self.piece = transport, piece

    def wait(self):
        self.transport.events.append("wait")
        return self.piece

    def done(self):
        self.transport.under_way -= 1


def test_pieces_travel_before_the_own_product_of_a_gathered_one():
    transport = Recorded(slots=4)
    gathered_product(torch.ones(2, 2), 2, transport.product, transport)
    assert transport.events == ["start", "start", "product", "wait", "product", "wait", "product"]


def test_summands_of_others_travel_before_the_own_product_and_are_added_when_somebody_waits():
    transport = Recorded(slots=4)
    scattering = start_scattered_product(torch.ones(4, 2), 2, transport.product, transport)
    assert transport.events == ["product", "start", "product", "start", "product"]
    torch.testing.assert_close(scattering.wait(), torch.full((2, 2), 2.0))
    assert transport.events[5:] == ["wait", "wait"]


@pytest.mark.parametrize(("slots", "size"), [(1, 2), (2, 3), (4, 2), (4, 3)])
def test_no_more_swaps_are_under_way_than_there_are_slots(slots, size):
    transport, shard = Recorded(slots, size), torch.arange(46.0).view(23, 2)
    output, _ = gathered_product(shard, 2, transport.product, transport)
    assert torch.equal(output, torch.cat([shard] * size))
    assert start_scattered_product(output, 2, transport.product, transport).wait().equal(size * shard)
    assert transport.most == slots * (size - 1)
    assert torch.equal(start_gathering(shard, transport).wait(), output)


@pytest.mark.parametrize(
    ("rows", "row_bytes", "piece_bytes", "lengths"),
    [(8, 2, 16, [8]), (9, 2, 16, [4, 5]), (3, 100, 16, [1, 1, 1]), (0, 2, 16, [0])],
)
def test_rows_are_cut_into_few_pieces_of_equal_size(rows, row_bytes, piece_bytes, lengths):
    pieces = cut_rows(rows, row_bytes, piece_bytes)
    assert [piece.stop - piece.start for piece in pieces] == lengths
    assert [i for piece in pieces for i in range(rows)[piece]] == list(range(rows))
