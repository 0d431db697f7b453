import types
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.errors import ConfigError
from megatron.parallel import linear
from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, RowParallelLinear
from tests.parallel.logical import assert_matches_dense, fill, logical, tensor_group
from tests.ranks import run_on_ranks

BOTH_LAYOUTS = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole_sequence", "sequence_shards"])
WITH_AND_WITHOUT_BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


class GatedMlp(nn.Module):
    """SwiGLU: gate and up are one product of two blocks."""

    def __init__(self, group, sequence_parallel):
        super().__init__()
        kind = {"bias": True, "group": group, "sequence_parallel": sequence_parallel}
        self.gate_up = ColumnParallelLinear(4, 12, blocks=2, **kind)
        self.down = RowParallelLinear(6, 4, **kind)

    def forward(self, hidden):
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def column_matches_dense(bias, sequence_parallel, keep_gathered=False):
    group = tensor_group()
    switches = {"sequence_parallel": sequence_parallel, "keep_gathered": keep_gathered}
    layer = ColumnParallelLinear(4, 6, bias=bias, group=group, **switches)
    sequence_dim = 0 if sequence_parallel else None
    dense = nn.Linear(4, 6, bias=bias)
    assert_matches_dense(layer, dense, logical(9, 4, 3, 4), group, input_dim=sequence_dim, output_dim=-1)


def row_matches_dense(bias, sequence_parallel):
    group = tensor_group()
    layer = RowParallelLinear(4, 6, bias=bias, group=group, sequence_parallel=sequence_parallel)
    sequence_dim = 0 if sequence_parallel else None
    dense = nn.Linear(4, 6, bias=bias)
    assert_matches_dense(layer, dense, logical(9, 4, 3, 4), group, input_dim=-1, output_dim=sequence_dim)


def gated_mlp_matches_dense(sequence_parallel):
    group = tensor_group()
    dim = 0 if sequence_parallel else None
    dense = GatedMlp(Group.alone(), sequence_parallel)
    assert_matches_dense(
        GatedMlp(group, sequence_parallel), dense, logical(9, 4, 3, 4), group, input_dim=dim, output_dim=dim
    )


def shapes_kept_for_backward(keep_gathered):
    switches = {"sequence_parallel": True, "keep_gathered": keep_gathered}
    layer = fill(ColumnParallelLinear(4, 6, bias=True, group=tensor_group(), **switches))
    shapes = []
    with saved_tensors_hooks(lambda tensor: shapes.append(tuple(tensor.shape)), lambda nothing: nothing):
        layer(torch.ones(2, 3, 4, requires_grad=True))
    return sorted(shapes)


class Recording(TorchDispatchMode):
    """Writes down the products and the starts and ends of collectives that `linear` asks for, in their order."""

    def __init__(self, events=None):
        super().__init__()
        self.events = [] if events is None else events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.events.append("product")
        return function(*args, **(kwargs or {}))

    def watch(self, name):
        start = getattr(linear, name)

        def recorded(tensor, group):
            pending = start(tensor, group)
            self.events.append(name.replace("start_", "start "))
            return types.SimpleNamespace(output=pending.output, wait=lambda: self._end(name, pending))

        return mock.patch.object(linear, name, recorded)

    def _end(self, name, pending):
        self.events.append(name.replace("start_", "end "))
        return pending.wait()


def events_of_backward(sequence_parallel, keep_gathered=False):
    switches = {"sequence_parallel": sequence_parallel, "keep_gathered": keep_gathered}
    layer = fill(ColumnParallelLinear(4, 6, bias=False, group=tensor_group(), **switches))
    output = layer(torch.ones(4, 3, 4, requires_grad=True))
    with Recording() as recording, ExitStack() as watches:
        for name in ("start_all_gather", "start_reduce_scatter", "start_all_reduce"):
            watches.enter_context(recording.watch(name))
        output.backward(torch.ones_like(output))
    return recording.events


def test_collectives_of_a_column_products_backward_run_beside_products():
    """The input is gathered beside the input gradient's product, which is summed beside the weight gradient's."""
    gathered = ["start all_gather", "product", "end all_gather"]
    summed = ["start reduce_scatter", "product", "end reduce_scatter"]
    assert run_on_ranks(2, events_of_backward, True) == [gathered + summed] * 2
    assert run_on_ranks(2, events_of_backward, True, True) == [["product", *summed]] * 2
    assert (
        run_on_ranks(2, events_of_backward, False) == [["product", "start all_reduce", "product", "end all_reduce"]] * 2
    )


@WITH_AND_WITHOUT_BIAS
@BOTH_LAYOUTS
def test_column_parallel_linear_matches_dense(bias, sequence_parallel):
    run_on_ranks(2, column_matches_dense, bias, sequence_parallel)


@WITH_AND_WITHOUT_BIAS
def test_column_parallel_linear_that_keeps_what_it_gathered_matches_dense(bias):
    run_on_ranks(2, column_matches_dense, bias, True, True)


@WITH_AND_WITHOUT_BIAS
@BOTH_LAYOUTS
def test_row_parallel_linear_matches_dense(bias, sequence_parallel):
    run_on_ranks(2, row_matches_dense, bias, sequence_parallel)


@BOTH_LAYOUTS
def test_gated_mlp_with_gate_and_up_in_one_product_matches_dense(sequence_parallel):
    run_on_ranks(2, gated_mlp_matches_dense, sequence_parallel)


def test_column_product_keeps_the_shard_of_its_input_or_if_asked_the_gathered_sequence():
    input_shard, gathered_rows, weight_shard = (2, 3, 4), (4 * 3, 4), (3, 4)
    assert run_on_ranks(2, shapes_kept_for_backward, False) == [[input_shard, weight_shard]] * 2
    assert run_on_ranks(2, shapes_kept_for_backward, True) == [[weight_shard, gathered_rows]] * 2


@pytest.mark.parametrize("layer_class", [ColumnParallelLinear, RowParallelLinear])
def test_a_group_of_one_is_the_plain_linear(layer_class):
    layer, dense = layer_class(4, 6, bias=True, group=Group.alone(), sequence_parallel=True), nn.Linear(4, 6)
    assert_matches_dense(layer, dense, logical(9, 5, 3, 4), Group.alone())


@pytest.mark.parametrize("layer_class", [ColumnParallelLinear, RowParallelLinear])
def test_features_that_the_ranks_do_not_divide_are_refused(layer_class):
    with pytest.raises(ConfigError, match="features 5 cannot be divided over 2 tensor-parallel ranks"):
        layer_class(5, 5, bias=False, group=Group(ranks=(0, 1), rank=0, handle=None))
