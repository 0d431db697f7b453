"""Every layout trains the model that one rank trains: losses, gradients, weights after plain SGD, evaluation."""

import shlex
from pathlib import Path

import pytest
import torch

from tests.layouts.recorded import MODELS, Record, record_all
from tests.ranks import run_on_ranks

BOUND = 1e-5
"""Relative error allowed in fp32."""

LAST_BIT = 2**-24
"""Of a number that fp32 holds, relative."""

TENSOR = "--tensor-model-parallel-size 2"
SHARDED = f"{TENSOR} --sequence-parallel"

IN_HALVES = f"{SHARDED} --tp-comm-overlap halves"

KEEPING = f"{SHARDED} --keep-gathered-inputs"

ULYSSES = "--ds-sequence-parallel-size 2"

STAGES = "--pipeline-model-parallel-size 2"

IN_PAIRS = f"--deepspeed_config {Path(__file__).with_name('zero3_in_pairs.json')}"
"""Backward gathers the weights of ZeRO-3 from two ranks instead of all."""

TWO_RANKS = [
    (f"{TENSOR} --zero-stage 0 --micro-batch-size 2", "gpt2"),
    (f"{SHARDED} --zero-stage 0 --micro-batch-size 4", "llama tied, query norms"),
    (f"{TENSOR} --zero-stage 1 --micro-batch-size 1", "llama"),
    (f"{SHARDED} --zero-stage 1 --micro-batch-size 2", "gpt2 untied, documents"),
    (f"{SHARDED} --zero-stage 2 --micro-batch-size 2 --cpu-optimizer", "gpt2"),
    (f"{SHARDED} --zero-stage 3 --micro-batch-size 2 --recompute-granularity full", "gpt2"),
    (f"{IN_HALVES} --zero-stage 1 --micro-batch-size 2 --keep-gathered-inputs", "gpt2"),
    (f"{IN_HALVES} --zero-stage 0 --micro-batch-size 4 --recompute-granularity full", "llama tied, query norms"),
    (f"{ULYSSES} --zero-stage 0 --micro-batch-size 2", "llama"),
    (f"{ULYSSES} --zero-stage 3 --micro-batch-size 2", "gemma"),
]

FOUR_RANKS = [
    (f"{TENSOR} --zero-stage 1 --micro-batch-size 1", "gpt2"),
    (f"{TENSOR} --zero-stage 2 --micro-batch-size 1", "llama"),
    (f"{TENSOR} --zero-stage 3 --micro-batch-size 2", "llama tied, query norms"),
    (f"{SHARDED} --zero-stage 0 --micro-batch-size 1", "llama"),
    (f"{KEEPING} --zero-stage 1 --micro-batch-size 2", "llama tied, query norms"),
    (f"{SHARDED} --zero-stage 1 --micro-batch-size 1", "llama, one key/value head"),
    (f"{SHARDED} --zero-stage 2 --micro-batch-size 1", "gpt2"),
    (f"{SHARDED} --zero-stage 3 --micro-batch-size 1", "gpt2 untied, documents"),
    ("--tensor-model-parallel-size 4 --sequence-parallel --micro-batch-size 4", "llama"),
    (f"{ULYSSES} --zero-stage 1 --micro-batch-size 1", "llama"),
    (f"{SHARDED} --zero-stage 3 --micro-batch-size 1 --remote-device cpu", "llama tied, query norms"),
    ("--zero-stage 3 --micro-batch-size 1 --remote-device cpu --cpu-optimizer", "gpt2"),
    (f"--zero-stage 3 --micro-batch-size 1 {IN_PAIRS}", "llama"),
    (f"{TENSOR} --zero-stage 3 --micro-batch-size 1 {IN_PAIRS} --remote-device cpu", "llama"),
    (f"{ULYSSES} --zero-stage 3 --micro-batch-size 1 {IN_PAIRS}", "gpt2"),
    (f"{ULYSSES} --zero-stage 2 --micro-batch-size 2", "gpt2 untied, documents"),
    (f"{ULYSSES} --zero-stage 3 --micro-batch-size 1", "gpt2"),
    (f"{ULYSSES} {KEEPING} --zero-stage 3 --micro-batch-size 2", "llama tied, query norms"),
    (f"{ULYSSES} {SHARDED} --zero-stage 1 --micro-batch-size 4", "gpt2"),
    ("--tensor-model-parallel-size 4 --sequence-parallel --tp-comm-overlap halves --micro-batch-size 4", "llama"),
    (f"{ULYSSES} {IN_HALVES} --zero-stage 2 --micro-batch-size 2", "gpt2 untied, documents"),
    (f"{STAGES} {IN_HALVES} --micro-batch-size 2", "llama, one key/value head"),
    (f"{STAGES} {TENSOR} --micro-batch-size 1", "llama tied, query norms"),
    (f"{STAGES} {SHARDED} --micro-batch-size 1", "llama, one key/value head"),
    (f"{STAGES} {KEEPING} --micro-batch-size 2 --recompute-granularity full", "gpt2"),
    (f"{STAGES} {ULYSSES} --micro-batch-size 1", "gpt2 untied, documents"),
    (f"{STAGES} --micro-batch-size 1", "gpt2"),
    (f"{STAGES} {SHARDED} --micro-batch-size 1", "gemma"),
    (f"{SHARDED} --zero-stage 3 --micro-batch-size 2 --recompute-granularity full", "gemma"),
]


def flags_of(layout: str, model: str) -> list[str]:
    return [*MODELS[model], *shlex.split(layout)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Record]:
    """The runs on one rank, by model."""
    runs = [flags_of("--zero-stage 0 --micro-batch-size 4", model) for model in MODELS]
    (records,) = run_on_ranks(1, record_all, runs, initialize=False, deepspeed=True)
    return dict(zip(MODELS, records, strict=True))


def error(value, reference) -> float:
    """Relative error of vectors, in the 2-norm."""
    value, reference = torch.as_tensor(value).double(), torch.as_tensor(reference).double()
    return ((value - reference).norm() / reference.norm()).item()


def errors(found: Record, expected: Record) -> dict[str, float]:
    """Everything's relative error; a weight's is that of the steps it took, plus the last bit that it can hold."""
    numbers = ("losses", "grad_norms", "params_norms", "evaluations")
    answer = {name: error(getattr(found, name), getattr(expected, name)) for name in numbers}
    for name, weight in expected.final.items():
        steps = (weight - expected.initial[name]).norm() + LAST_BIT / BOUND * weight.norm()
        answer[name] = ((found.final[name] - weight).norm() / steps).item()
    return answer


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["2 ranks", "4 ranks"])
def test_every_layout_trains_the_model_that_one_rank_trains(alone, ranks, cases):
    runs = [flags_of(*case) for case in cases]
    for records in run_on_ranks(ranks, record_all, runs, initialize=False, deepspeed=True, timeout=300):
        for (layout, model), found in zip(cases, records, strict=True):
            expected = alone[model]
            assert min(expected.grad_norms) > 1.0, "clipping is to be at work"
            assert found.initial.keys() == expected.initial.keys()
            assert all(torch.equal(found.initial[name], weight) for name, weight in expected.initial.items())
            wrong = {name: value for name, value in errors(found, expected).items() if not value <= BOUND}
            assert not wrong, (layout, model, wrong)


def test_each_kind_of_model_is_trained_in_sequence_parallel_and_pipelined_layouts():
    """Also with fewer key/value heads than tensor ranks; masks are uneven in all, as `COMMON` says."""
    kinds = {
        "untied": {model for model, flags in MODELS.items() if "--untie-embeddings-and-output-weights" in flags},
        "rotary": {model for model, flags in MODELS.items() if "rope" in flags},
        "documents": {model for model, flags in MODELS.items() if "--reset-attention-mask" in flags},
        "one key/value head": {"llama, one key/value head"},
    }
    kinds |= {"tied": MODELS.keys() - kinds["untied"], "learned positions": MODELS.keys() - kinds["rotary"]}
    for axis in (SHARDED, STAGES):
        trained = {model for layout, model in TWO_RANKS + FOUR_RANKS if axis in layout}
        assert not [kind for kind, models in kinds.items() if not models & trained], axis
