"""A model of fused operations is the model of plain torch in every layout: as their CPU forms compute it."""

import pytest

from megatron.kernels.choice import FUSED, Kernels
from megatron.training import build
from tests.layouts.recorded import record_all
from tests.layouts.test_matrix import BOUND, SHARDED, STAGES, TENSOR, errors, flags_of
from tests.ranks import run_on_ranks

ALL_FUSED = Kernels(**{part: function for parts in FUSED.values() for part, function in parts.items()})
CASES = {
    1: [("--zero-stage 3 --micro-batch-size 2", "gpt2"), ("--zero-stage 1 --micro-batch-size 4", "llama")],
    2: [
        (f"{TENSOR} --zero-stage 1 --micro-batch-size 2 --attention-backend unfused", "gpt2"),
        (f"{SHARDED} --zero-stage 3 --micro-batch-size 1 --recompute-granularity full", "gpt2"),
        (f"{SHARDED} --zero-stage 3 --micro-batch-size 2 --loss-chunk-size 6", "llama tied, query norms"),
        (f"{STAGES} --micro-batch-size 1", "gpt2"),
    ],
}


def record_fused(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "choose_kernels", lambda config, device_type: (ALL_FUSED, "fused"))
        return record_all(runs)


@pytest.mark.parametrize("ranks", CASES)
def test_fused_operations_train_the_same_model(ranks):
    cases = CASES[ranks]
    models = sorted({model for _, model in cases})
    plain = [flags_of("--zero-stage 0 --micro-batch-size 4", model) for model in models]
    (expected,) = run_on_ranks(1, record_all, plain, initialize=False, deepspeed=True)
    alone = dict(zip(models, expected, strict=True))
    fused = [flags_of(*case) for case in cases]
    for records in run_on_ranks(ranks, record_fused, fused, initialize=False, deepspeed=True):
        for (layout, model), found in zip(cases, records, strict=True):
            wrong = {name: value for name, value in errors(found, alone[model]).items() if not value <= BOUND}
            assert not wrong, (layout, model, wrong)


DROPPED = "--hidden-dropout 0.3 --zero-stage 3"


def test_hidden_dropout_is_the_same_whatever_the_tensor_layout():
    """The mask follows from the seed and the place in the sequence: two ranks, with shards of it or without, draw it.

    The biases before it, and their gradients, are part of it.
    """
    flags = [flags_of(f"{DROPPED} --micro-batch-size 2", "gpt2")]
    ((expected,),) = run_on_ranks(1, record_fused, flags, initialize=False, deepspeed=True)
    for layout in (TENSOR, f"{SHARDED} --recompute-granularity full"):
        flags = [flags_of(f"{DROPPED} --micro-batch-size 2 {layout}", "gpt2")]
        for (found,) in run_on_ranks(2, record_fused, flags, initialize=False, deepspeed=True):
            assert not {name: value for name, value in errors(found, expected).items() if not value <= BOUND}
