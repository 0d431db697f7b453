"""What travels between tensor ranks: choices that cannot be had are refused in one sentence."""

import pytest

from megatron.config.rules import broken_rules
from megatron.config.run import load_run_config
from tests.config.command_lines import legal

SHARDED = "--tensor-model-parallel-size 2 --sequence-parallel"
IN_HALVES = f"{SHARDED} --tp-comm-overlap halves"

REFUSED = {
    "--tp-comm-overlap halves --micro-batch-size 2": (
        "--tp-comm-overlap halves & --sequence-parallel & --tp-comm-overlap none"
    ),
    f"{IN_HALVES} --micro-batch-size 3": "--tp-comm-overlap halves & --micro-batch-size 3 & use 4",
    f"{IN_HALVES} --micro-batch-size 2 --zero-stage 3": "--tp-comm-overlap halves & --zero-stage 3 & 1 or 2",
    "--tensor-model-parallel-size 2 --tp-comm-overlap copies": "--tp-comm-overlap copies & --sequence-parallel & none",
    f"{SHARDED} --tp-comm-overlap copies --precision bf16 --fp8": (
        "--tp-comm-overlap copies with --fp8 & none or halves"
    ),
    f"{SHARDED} --tp-comm-overlap copies --recompute-granularity products --recompute-budget-gib 1": (
        "--tp-comm-overlap copies with --recompute-granularity products & none or halves"
    ),
    "--tensor-model-parallel-size 2 --keep-gathered-inputs": "--keep-gathered-inputs & --sequence-parallel & add that",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_tensor_ranks_cannot_do_is_refused_in_one_sentence(words):
    (told,) = broken_rules(load_run_config(legal(*words.split()), None).config, None)
    assert all(part in told for part in REFUSED[words].split(" & "))


@pytest.mark.parametrize("words", [SHARDED, f"{IN_HALVES} --micro-batch-size 2"])
def test_gathered_inputs_may_be_kept_wherever_there_are_some(words):
    config = load_run_config(legal(*words.split(), "--keep-gathered-inputs"), None).config
    assert list(broken_rules(config, None)) == []
