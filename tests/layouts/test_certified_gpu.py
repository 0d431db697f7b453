"""Certificates on two GPUs, over NCCL and in bf16: EQUAL in every layout, ZeRO stage and policy of recompute."""

import pytest

from tests.layouts.certified import certify_right, task_of

DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
LAYOUTS = {
    "tensor and sequence": f"--tensor-model-parallel-size 2 --sequence-parallel --precision bf16 {DROPOUT}",
    "pipeline": "--pipeline-model-parallel-size 2 --precision bf16",
    "Ulysses": f"--ds-sequence-parallel-size 2 --precision bf16 {DROPOUT}",
    "data": "--zero-stage 0",
    "ZeRO 1": "--zero-stage 1 --precision bf16",
    "ZeRO 2": "--zero-stage 2 --precision bf16",
    "ZeRO 3": f"--zero-stage 3 --precision bf16 --recompute-granularity full {DROPOUT}",
}

FULL, UNITS = "--recompute-granularity full", "--num-layers 4 --recompute-granularity full --recompute-num-layers 2"
FIRST_BLOCKS = f"--num-layers 4 {FULL} --recompute-method block --recompute-num-layers 1"
PRODUCTS = "--recompute-granularity products --recompute-budget-gib 2e-5"  # some of a unit's products
TENSOR, PIPELINE, ULYSSES = (
    f"--{axis} 2 --precision bf16 {DROPOUT}"
    for axis in ("tensor-model-parallel-size", "pipeline-model-parallel-size", "ds-sequence-parallel-size")
)
RECOMPUTE = {
    "blocks, sequence": f"{TENSOR} --sequence-parallel {FULL}",
    "units with divided inputs, tensor": f"{TENSOR} {UNITS} --distribute-saved-activations",
    "first blocks on the host, pipeline": f"{PIPELINE} {FIRST_BLOCKS} --recompute-inputs-on-host",
    "units, ZeRO 2": f"--zero-stage 2 --precision bf16 {DROPOUT} {UNITS}",
    "attention core, sequence": f"{TENSOR} --sequence-parallel --recompute-granularity selective",
    "attention core of plain products": "--zero-stage 1 --precision bf16 --attention-backend unfused "
    f"{DROPOUT} --recompute-granularity selective",
    "products, Ulysses": f"{ULYSSES} {PRODUCTS}",
    "products with divided inputs, tensor": f"{TENSOR} {PRODUCTS} --distribute-saved-activations",
    "products, ZeRO 3": f"--zero-stage 3 --precision bf16 {DROPOUT} {PRODUCTS}",
}


@pytest.mark.gpu(2)
@pytest.mark.parametrize("layouts", [LAYOUTS, RECOMPUTE], ids=["layouts", "recompute"])
def test_two_gpus_are_certified_equal(tmp_path, layouts):
    tasks = {name: task_of(words, 2, 5, tmp_path / name) for name, words in layouts.items()}
    for name, certificate in certify_right(tasks, "nccl").items():
        print(f"{name}: {certificate.worst_first[0]}, peak GiB {certificate.peak_gib}")
        assert certificate.equal, (name, certificate.worst_first[:5])
