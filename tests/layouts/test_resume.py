"""A run in a layout is resumed bit for bit in that layout, dropout on."""

import shlex

from tests.layouts.recorded import MODELS, record
from tests.ranks import run_on_ranks

DROPOUT = shlex.split("--hidden-dropout 0.1 --attention-dropout 0.1 --recompute-granularity full")
LAYOUTS = {
    "sequence parallel, ZeRO 1": "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1",
    "tensor parallel, ZeRO 3": "--tensor-model-parallel-size 2 --zero-stage 3",
    "Ulysses, ZeRO 2": "--ds-sequence-parallel-size 2 --zero-stage 2",
}


def interrupt_and_resume(folder):
    """Losses straight through, up to the interruption and after it."""
    found = {}
    for name, layout in LAYOUTS.items():
        flags = [*MODELS["gpt2"], *DROPOUT, *shlex.split(layout), "--micro-batch-size", "2"]
        kept = ["--save", str(folder / name), "--load", str(folder / name), "--load-if-exists"]
        runs = [record(flags), record([*flags, *kept, "--exit-interval", "2"]), record([*flags, *kept])]
        found[name] = [run.losses for run in runs]
    return found


def test_a_layout_is_resumed_bit_for_bit(tmp_path):
    first, second = run_on_ranks(2, interrupt_and_resume, tmp_path, initialize=False, deepspeed=True)
    assert first == second
    for name, (straight, before, after) in first.items():
        assert before + after == straight, name
        assert len(after) == 1
