"""Half precision in layouts: as close to one rank in fp32 as one rank in half precision is, a skipped step included."""

import itertools
import shlex

import pytest
import torch

from tests.layouts.recorded import MODELS, Record, record_all
from tests.ranks import run_on_ranks

FACTOR = 2.0
"""How much further from the exact run a layout may be than one rank in half precision is, at most, over the models and
kinds of sums here. Each sums in another order, so that neither is nearer to the truth. Measured, the largest distances
of layouts are 0.95 to 1.4 times those of one rank, which in bf16 are 1e-3 of losses, 2e-3 of gradient norms and 4e-2 of
what the weights moved, in fp16 an eighth of that."""

POISONED_STEP = 1

COMMON = "--train-iters 4 --micro-batch-size 1 --lr 0.2 --min-lr 0.2 --initial-loss-scale 256 --hysteresis 1"
TENSOR = "--tensor-model-parallel-size 2"
MODEL_OF = {
    TENSOR: "gpt2 untied, documents",
    f"{TENSOR} --sequence-parallel": "gpt2",
    f"{TENSOR} --sequence-parallel --ds-sequence-parallel-size 2": "llama",
    "--ds-sequence-parallel-size 2": "llama tied, query norms",
}
SUMS = ("--accumulate-allreduce-grads-in-fp32", "--no-accumulate-allreduce-grads-in-fp32")

CASES = [
    (layout, stage, precision, SUMS[(index + stage) % 2])
    for precision in ("bf16", "fp16")
    for (index, layout), stage in itertools.product(enumerate(MODEL_OF), (1, 2, 3))
]
"""Every stage and precision in every layout, every other one with gradients summed in fp32."""


def flags_of(model: str, precision: str, more: str) -> list[str]:
    return [*MODELS[model], *shlex.split(f"{COMMON} --precision {precision} {more}")]


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, ...], Record]:
    """The runs on one rank: fp32, and both half precisions with both kinds of sums."""
    keys = [(model, "fp32", "--zero-stage 0") for model in MODEL_OF.values()]
    keys += itertools.product(MODEL_OF.values(), ("bf16", "fp16"), SUMS)
    runs = [flags_of(*key) for key in keys]
    (records,) = run_on_ranks(1, record_all, runs, POISONED_STEP, initialize=False, deepspeed=True)
    return dict(zip(keys, records, strict=True))


def distances(found: Record, exact: Record) -> dict[str, float]:
    """How far a run is from the exact one, relative; of the weights the steps that they took, all in one vector."""
    finite = [step for step in range(len(exact.losses)) if step != POISONED_STEP]
    numbers = {
        "losses": (found.losses, exact.losses),
        "gradient norms": ([one.grad_norms[step] for step in finite] for one in (found, exact)),
        "evaluations": (found.evaluations, exact.evaluations),
        "weights": (
            torch.cat([(one.final[name] - exact.initial[name]).flatten() for name in exact.final])
            for one in (found, exact)
        ),
    }
    answer = {}
    for name, pair in numbers.items():
        value, wanted = (torch.as_tensor(one).double() for one in pair)
        answer[name] = ((value - wanted).norm() / wanted.norm()).item()
    return answer


@pytest.fixture(scope="module")
def bounds(alone) -> dict[tuple[str, str], float]:
    """The largest distance of one rank's runs from the exact ones, by precision and by what is compared."""
    answer: dict[tuple[str, str], float] = {}
    for (model, precision, _), found in alone.items():
        for name, distance in distances(found, alone[model, "fp32", "--zero-stage 0"]).items():
            answer[precision, name] = max(answer.get((precision, name), 0.0), distance)
    return answer


def test_half_precision_in_a_layout_is_as_exact_as_on_one_rank(alone, bounds):
    runs = [
        flags_of(MODEL_OF[layout], precision, f"{layout} --zero-stage {stage} {sums}")
        for layout, stage, precision, sums in CASES
    ]
    for records in run_on_ranks(4, record_all, runs, POISONED_STEP, initialize=False, deepspeed=True, timeout=300):
        for case, found in zip(CASES, records, strict=True):
            layout, _, precision, sums = case
            exact, single = (alone[MODEL_OF[layout], *of] for of in (("fp32", "--zero-stage 0"), (precision, sums)))
            assert found.skipped == single.skipped == exact.skipped == [POISONED_STEP], case
            assert found.loss_scales == single.loss_scales, case
            assert found.loss_scales == ([256.0, 256.0, 128.0, 128.0] if precision == "fp16" else [1.0] * 4), case
            for name, distance in distances(found, exact).items():
                assert distance <= FACTOR * bounds[precision, name], (case, name, distance)
