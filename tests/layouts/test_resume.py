"""A run in a layout is resumed bit for bit in that layout, dropout on, and refused in another."""

import shlex

import pytest

from megatron.checkpoint.errors import CheckpointError
from tests.layouts.recorded import MODELS, record
from tests.ranks import run_on_ranks

DROPOUT = shlex.split("--hidden-dropout 0.1 --attention-dropout 0.1 --recompute-granularity full")
LAYOUTS = {
    "sequence parallel, ZeRO 1": "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1",
    "tensor parallel, ZeRO 3": "--tensor-model-parallel-size 2 --zero-stage 3",
    "Ulysses, ZeRO 2": "--ds-sequence-parallel-size 2 --zero-stage 2",
}


def interrupt_and_resume(folder):
    """Losses straight through, up to the interruption and after it; and what another layout is told."""
    found = {}
    for name, layout in LAYOUTS.items():
        flags = [*MODELS["gpt2"], *DROPOUT, *shlex.split(layout), "--micro-batch-size", "2"]
        kept = ["--save", str(folder / name), "--load", str(folder / name), "--load-if-exists"]
        runs = [record(flags), record([*flags, *kept, "--exit-interval", "2"]), record([*flags, *kept])]
        with pytest.raises(CheckpointError) as caught:
            record([*flags, *kept, "--tensor-model-parallel-size", "1", "--ds-sequence-parallel-size", "1"])
        found[name] = [run.losses for run in runs], str(caught.value)
    return found


def test_a_layout_is_resumed_bit_for_bit_and_another_is_refused(tmp_path):
    first, second = run_on_ranks(2, interrupt_and_resume, tmp_path, initialize=False, deepspeed=True)
    assert first == second
    for name, ((straight, before, after), refusal) in first.items():
        assert before + after == straight, name
        assert len(after) == 1
        axis = "ds-sequence-parallel-size" if "Ulysses" in name else "tensor-model-parallel-size"
        assert f"{axis} 2, and this run has 1" in refusal
