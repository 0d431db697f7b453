"""A loss computed in chunks trains the model that the loss of all logits trains, in every layout."""

import pytest

from tests.layouts.recorded import record_all
from tests.layouts.test_matrix import BOUND, SHARDED, STAGES, TENSOR, ULYSSES, errors, flags_of
from tests.ranks import run_on_ranks

CHUNKED = "--loss-chunk-size 6"
"""Tokens: no divisor of a sequence, so that the last chunk is smaller."""

CASES = {
    1: [("--zero-stage 0 --micro-batch-size 4", "gpt2"), ("--zero-stage 3 --micro-batch-size 2", "llama")],
    2: [
        (f"{TENSOR} --zero-stage 1 --micro-batch-size 2", "gpt2"),
        (f"{SHARDED} --zero-stage 3 --micro-batch-size 1", "gpt2"),
        (f"{SHARDED} --zero-stage 0 --micro-batch-size 2", "gpt2 untied, documents"),
        (f"{ULYSSES} --zero-stage 2 --micro-batch-size 2", "llama tied, query norms"),
    ],
    4: [(f"{STAGES} {SHARDED} --micro-batch-size 2", "gpt2"), (f"{STAGES} {TENSOR} --micro-batch-size 1", "llama")],
}


@pytest.mark.parametrize("ranks", CASES)
def test_chunks_change_no_training(ranks):
    cases = CASES[ranks]
    models = sorted({model for _, model in cases})
    plain = [flags_of("--zero-stage 0 --micro-batch-size 4", model) for model in models]
    (expected,) = run_on_ranks(1, record_all, plain, initialize=False, deepspeed=True)
    alone = dict(zip(models, expected, strict=True))
    chunked = [flags_of(f"{layout} {CHUNKED}", model) for layout, model in cases]
    for records in run_on_ranks(ranks, record_all, chunked, initialize=False, deepspeed=True):
        for (layout, model), found in zip(cases, records, strict=True):
            wrong = {name: value for name, value in errors(found, alone[model]).items() if not value <= BOUND}
            assert not wrong, (layout, model, wrong)
