"""An MLP in chunks trains the model that the plain one trains, in every layout and with recompute."""

import pytest

from tests.layouts.recorded import record_all
from tests.layouts.test_matrix import BOUND, SHARDED, STAGES, TENSOR, ULYSSES, errors, flags_of
from tests.ranks import run_on_ranks

CHUNKED = "--mlp-chunk-size 6"
"""Tokens: no divisor of a sequence, so that the last chunk is smaller."""

FULL = "--recompute-granularity full"
PRODUCTS = "--recompute-granularity products --recompute-budget-gib 2e-5"

CASES = {
    1: [
        ("--zero-stage 0 --micro-batch-size 4", "gpt2"),
        (f"--zero-stage 3 --micro-batch-size 2 {FULL}", "llama"),
        (f"--zero-stage 1 --micro-batch-size 2 {PRODUCTS} --loss-chunk-size 6", "gemma"),
    ],
    2: [
        (f"{TENSOR} --zero-stage 1 --micro-batch-size 2 {PRODUCTS}", "gpt2"),
        (f"{SHARDED} --zero-stage 3 --micro-batch-size 1 {FULL} --recompute-num-layers 2", "gpt2"),
        (f"{SHARDED} --zero-stage 0 --micro-batch-size 2 {PRODUCTS}", "gpt2 untied, documents"),
        (f"{ULYSSES} --zero-stage 2 --micro-batch-size 2", "llama tied, query norms"),
        (f"{ULYSSES} --zero-stage 3 --micro-batch-size 2 --recompute-granularity selective", "llama"),
        (f"{SHARDED} --zero-stage 2 --micro-batch-size 2 --cpu-optimizer", "llama, one key/value head"),
    ],
    4: [
        (f"{STAGES} {SHARDED} --micro-batch-size 2 {FULL}", "gpt2"),
        (f"{STAGES} {TENSOR} --micro-batch-size 1", "llama"),
        (f"{STAGES} {ULYSSES} --micro-batch-size 1 {PRODUCTS}", "gpt2 untied, documents"),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_chunks_change_no_training(ranks):
    cases = CASES[ranks]
    models = sorted({model for _, model in cases})
    plain = [flags_of("--zero-stage 0 --micro-batch-size 4", model) for model in models]
    (expected,) = run_on_ranks(1, record_all, plain, initialize=False, deepspeed=True)
    alone = dict(zip(models, expected, strict=True))
    chunked = [flags_of(f"{layout} {CHUNKED}", model) for layout, model in cases]
    for records in run_on_ranks(ranks, record_all, chunked, initialize=False, deepspeed=True, timeout=300):
        for (layout, model), found in zip(cases, records, strict=True):
            wrong = {name: value for name, value in errors(found, alone[model]).items() if not value <= BOUND}
            assert not wrong, (layout, model, wrong)
