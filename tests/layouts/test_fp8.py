"""Products in 8 bits in layouts: as close to fp32 on one rank as 8 bits on one rank are, and resumed in every bit."""

import itertools
import shlex

import torch

from megatron.kernels.fp8_products import Fp8Products
from megatron.parallel.groups import Group
from megatron.parallel.linear import ColumnParallelLinear, RowParallelLinear
from tests.layouts.certified import certify_right, task_of
from tests.layouts.recorded import record
from tests.parallel.logical import tensor_group
from tests.ranks import run_on_ranks

FP8 = "--precision bf16 --fp8"
SHARDED = "--tensor-model-parallel-size 2 --sequence-parallel"
LLAMA = """
    --position-embedding-type rope --normalization rmsnorm --activation-function swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights
"""

LAYOUTS = {
    "tensor": f"{FP8} --tensor-model-parallel-size 2",
    "tensor and sequence, ZeRO 1": f"{FP8} {SHARDED} --zero-stage 1 {LLAMA}",
    "halves": f"{FP8} {SHARDED} --tp-comm-overlap halves --keep-gathered-inputs --micro-batch-size 2 {LLAMA}",
    "Ulysses, ZeRO 2": f"{FP8} --ds-sequence-parallel-size 2 --zero-stage 2",
    "pipeline": f"{FP8} --pipeline-model-parallel-size 2 --fp8-format e4m3 {LLAMA}",
    "ZeRO 3": f"{FP8} --zero-stage 3",
    "kept products": f"{FP8} --zero-stage 1 --recompute-granularity products --recompute-budget-gib 0.0001",
}


def test_layouts_are_certified_equal_in_8_bits(tmp_path):
    certificates = certify_right({name: task_of(words, 2, 2, tmp_path / name) for name, words in LAYOUTS.items()})
    for name, certificate in certificates.items():
        assert certificate.equal, (name, certificate.worst_first[:5])
        assert {found.precision for found in certificate.findings} == {"fp32", "fp8"}


# ---- one layer: ranks with scales of their own compute with the numbers of one rank


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def own_rows(tensor, group, dim=0):
    return tensor.chunk(group.size, dim=dim)[group.rank]


def run_layer(kind, group, sequence_parallel, input, grad):
    """Output, and gradients of input, weight and bias, of a layer of 64 to 96 features."""
    layer = kind(64, 96, bias=True, group=group, sequence_parallel=sequence_parallel, products=Fp8Products()).bfloat16()
    weight, bias = draw(96, 64, seed=1), draw(96, seed=2)
    column = kind is ColumnParallelLinear
    with torch.no_grad():
        layer.weight.copy_(own_rows(weight, group, 0 if column else 1))
        layer.bias.copy_(own_rows(bias, group) if column else bias)
    input = input.clone().requires_grad_()
    output = layer(input)
    output.backward(grad)
    return [x.detach() for x in (output, input.grad, layer.weight.grad, layer.bias.grad)]


def distances_of_sharded_layers():
    """How far the parts of each rank are from those of one rank, by layer, sharding of the sequence, and what."""
    group, found = tensor_group(), {}
    input, grad = draw(8, 3, 64, seed=3), draw(8, 3, 96, seed=4)
    for kind, sequence_parallel in itertools.product((ColumnParallelLinear, RowParallelLinear), (False, True)):
        column = kind is ColumnParallelLinear
        part = (lambda x: own_rows(x, group)) if sequence_parallel else (lambda x: x)
        given = (part(input), own_rows(grad, group, 2)) if column else (own_rows(input, group, 2), part(grad))
        dense = run_layer(kind, Group.alone(), False, input, grad)
        if column:
            expected = [
                own_rows(dense[0], group, 2),
                part(dense[1]),
                own_rows(dense[2], group),
                own_rows(dense[3], group),
            ]
        else:
            expected = [part(dense[0]), own_rows(dense[1], group, 2), own_rows(dense[2], group, 1), dense[3]]
        actual = run_layer(kind, group, sequence_parallel, *given)
        for name, one, other in zip(("output", "input", "weight", "bias"), actual, expected, strict=True):
            found[kind.__name__, sequence_parallel, name] = (
                (one.double() - other.double()).norm() / other.double().norm()
            ).item()
    return found


def test_sharded_layers_differ_from_one_rank_by_roundings_of_bf16_alone():
    for found in run_on_ranks(2, distances_of_sharded_layers):
        for what, distance in found.items():
            assert distance < 2.0**-8, what
        assert found["ColumnParallelLinear", False, "output"] == found["ColumnParallelLinear", True, "output"] == 0


# ---- whole runs


ADAM = shlex.split("--optimizer adam --lr 1e-2 --min-lr 1e-2 --micro-batch-size 2 --hidden-dropout 0.1")


def run_straight_and_interrupted(folder):
    flags = [*ADAM, *shlex.split(f"{FP8} --tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1")]
    kept = ["--save", str(folder), "--load", str(folder), "--load-if-exists", "--verify-resume"]
    runs = [record(flags), record([*flags, *kept, "--exit-interval", "2"]), record([*flags, *kept])]
    recomputed = record([*flags, "--recompute-granularity", "full"])
    return [run.losses for run in (*runs, recomputed)], [run.final for run in (runs[0], recomputed)]


def test_a_run_in_8_bits_is_resumed_and_recomputed_bit_for_bit(tmp_path):
    for losses, (final, final_recomputed) in run_on_ranks(
        2, run_straight_and_interrupted, tmp_path, initialize=False, deepspeed=True, timeout=300
    ):
        straight, before, after, recomputed = losses
        assert before + after == straight == recomputed
        assert len(after) == 1
        assert all(torch.equal(final_recomputed[name], weight) for name, weight in final.items())
