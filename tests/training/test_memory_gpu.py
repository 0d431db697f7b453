"""On a GPU the most memory that a run holds is what its start says, within a twentieth."""

import shlex
from pathlib import Path

import pytest

from megatron.config.run import load_run_config
from megatron.engine.local_ranks import run_local_ranks
from megatron.training.benchmark import for_measuring, join_figures, measure_run, predict_run

RUN = shlex.split(
    """
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --vocab-size 50304 --mock-data
    --train-iters 2 --lr 1e-4 --attention-dropout 0 --hidden-dropout 0 --num-workers 0
    """
)
RUNS = {
    "all kept": "--micro-batch-size 8 --global-batch-size 16",
    "one micro-batch": "--micro-batch-size 8",
    "blocks recomputed, loss in chunks": (
        "--micro-batch-size 2 --global-batch-size 4 --seq-length 8192 --recompute-granularity full "
        "--loss-chunk-size 4096"
    ),
    "some products kept": (
        "--micro-batch-size 8 --global-batch-size 16 --recompute-granularity products --recompute-budget-gib 2"
    ),
    "long": "--global-batch-size 2 --seq-length 32768 --loss-chunk-size 4096",
    "gated, rotary": (
        "--micro-batch-size 4 --global-batch-size 8 --position-embedding-type rope --normalization rmsnorm "
        "--activation-function swiglu --no-add-bias-linear --untie-embeddings-and-output-weights"
    ),
    "fp16": "--micro-batch-size 4 --global-batch-size 8 --precision fp16",
    "ZeRO 2": "--micro-batch-size 8 --global-batch-size 16 --zero-stage 2",
    "ZeRO 3": "--micro-batch-size 8 --global-batch-size 16 --zero-stage 3",
    "blocks recorded": "--micro-batch-size 8 --global-batch-size 16 --cuda-graph",
    "optimizer on the host": "--micro-batch-size 4 --global-batch-size 8 --cpu-optimizer",
}
TWO = {
    "tensor": "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 8 --global-batch-size 16",
    "Ulysses": "--ds-sequence-parallel-size 2 --micro-batch-size 8 --global-batch-size 16",
    "data": "--micro-batch-size 4 --global-batch-size 16",
    "pipeline": "--pipeline-model-parallel-size 2 --micro-batch-size 4 --global-batch-size 16",
}


def check(flags: str, ranks: int, folder: Path, tolerance: float) -> None:
    config = load_run_config([*RUN, *shlex.split(flags)], ranks).config
    predicted = predict_run(config, ranks).peak / 2**30
    config = for_measuring(config, 1, folder)
    measured = join_figures(run_local_ranks(ranks, measure_run, config, folder, timeout=300.0))["allocated_gib"]
    print(f"predicted {predicted:.2f} GiB, measured {measured:.2f}: {flags}")
    assert measured == pytest.approx(predicted, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_peak_on_one_gpu_is_what_was_predicted(name, tmp_path):
    check(RUNS[name], 1, tmp_path, 0.05)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", TWO)
def test_peak_on_two_gpus_is_what_was_predicted(name, tmp_path):
    check(TWO[name], 2, tmp_path, 0.1)
