"""Twenty steps of training in a layout have the losses of one rank, step by step: SGD and Adam, batches that grow."""

import shlex

import pytest

from tests.layouts.recorded import MODELS, Record, record_all
from tests.ranks import run_on_ranks

BOUND = 1e-5
"""Relative error of each step's loss in fp32."""

COMMON = (
    "--train-iters 20 --global-batch-size 4 --rampup-batch-size 2 2 16 --micro-batch-size 1 "
    "--no-log-params-norm --eval-interval 10"
)

OPTIMIZERS = {
    "sgd": "--optimizer sgd --lr 0.1 --min-lr 0.01 --sgd-momentum 0.9 --lr-decay-style cosine --lr-warmup-iters 4",
    "adam": "--optimizer adam --lr 3e-3 --min-lr 3e-4 --adam-eps 1e-4 --lr-decay-style cosine --lr-warmup-iters 4",
}
"""Adam's first updates are lr x g / (|g| + eps): at the usual eps of 1e-8 a gradient that is nothing but rounding moves
its weight by the whole learning rate, in a direction that the order of summation decides. An eps far above the rounding
of gradients (1e-7 of entries around 1e-2) and below most gradients compares layouts instead of that rounding."""

TENSOR = "--tensor-model-parallel-size 2"
LAYOUTS = {
    2: (
        [f"--zero-stage {stage}" for stage in range(4)]
        + [f"{TENSOR} --zero-stage 2", f"{TENSOR} --sequence-parallel --zero-stage 1"]
        + ["--ds-sequence-parallel-size 2 --zero-stage 3", "--pipeline-model-parallel-size 2"]
    ),
    8: [f"{TENSOR} --sequence-parallel --pipeline-model-parallel-size 2"],
}
"""By the number of ranks; data-parallel ranks fill up what a layout leaves."""


def flags_of(layout: str, optimizer: str, model: str) -> list[str]:
    return [*MODELS[model], *shlex.split(f"{COMMON} {OPTIMIZERS[optimizer]} {layout}")]


RUNS = [("sgd", "gpt2"), ("adam", "llama")]


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Record]:
    """The runs on one rank."""
    runs = [flags_of("--zero-stage 0", *run) for run in RUNS]
    (records,) = run_on_ranks(1, record_all, runs, initialize=False, deepspeed=True)
    return dict(zip(RUNS, records, strict=True))


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_twenty_steps_have_the_losses_of_one_rank(alone, ranks):
    cases = [(layout, run) for layout in LAYOUTS[ranks] for run in RUNS]
    runs = [flags_of(layout, *run) for layout, run in cases]
    for records in run_on_ranks(ranks, record_all, runs, initialize=False, deepspeed=True, timeout=300):
        for (layout, run), found in zip(cases, records, strict=True):
            expected = alone[run]
            assert len(found.losses) == 20
            assert expected.losses[-1] < expected.losses[0] - 0.2, "it is to learn"
            for name in ("losses", "evaluations"):
                wanted = pytest.approx(getattr(expected, name), rel=BOUND)
                assert getattr(found, name) == wanted, (layout, run, name)
