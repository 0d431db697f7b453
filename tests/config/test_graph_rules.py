"""What a GPU cannot repeat, or would repeat wrongly, is refused in one sentence."""

import pytest

from megatron.config.rules import broken_rules
from megatron.config.run import load_run_config
from tests.config.command_lines import legal

HALVES = "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap halves"

REFUSED = {
    "--compile": "--compile would not",
    "--fp8": "--fp8 would not",
    "--recompute-granularity full --mlp-chunk-size 64": "full and --mlp-chunk-size 64 would not",
    "--tensor-model-parallel-size 2 --attention-dropout 0.1": "2 and --attention-dropout 0.1: ",
    f"{HALVES} --micro-batch-size 2 --hidden-dropout 0.1 --no-fused-kernels --attention-dropout 0": (
        "2 and --hidden-dropout 0.1 and --no-fused-kernels: "
    ),
    "--pipeline-model-parallel-size 2": "--pipeline-model-parallel-size 2 would not",
    "--ds-sequence-parallel-size 2": "--ds-sequence-parallel-size 2 would not",
    "--reset-attention-mask": "--reset-attention-mask would not",
    "--reset-position-ids": "--reset-position-ids would not",
    "--precision fp16": "--cuda-graph with --precision fp16: ",
    "--precision fp32": "--cuda-graph with --precision fp32: ",
    "--zero-stage 2 --cpu-optimizer": "--cuda-graph with --zero-stage 2 and --cpu-optimizer: ",
    "--zero-stage 3": "--cuda-graph with --zero-stage 3: ",
    "--no-accumulate-allreduce-grads-in-fp32": "--cuda-graph with --no-accumulate-allreduce-grads-in-fp32: ",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_gpu_would_not_repeat_is_refused_in_one_sentence(words):
    config = load_run_config(legal("--cuda-graph", *words.split()), None).config
    (told,) = broken_rules(config, None)
    assert told.startswith("--cuda-graph ")
    assert REFUSED[words] in told


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--hidden-dropout 0.1 --attention-dropout 0.1",
        "--loss-chunk-size 64",
        "--tensor-model-parallel-size 2 --hidden-dropout 0.1 --attention-dropout 0 --no-fused-kernels",
        f"{HALVES} --micro-batch-size 2 --hidden-dropout 0.1 --attention-dropout 0",
    ],
)
def test_what_it_repeats_as_well_is_allowed(words):
    config = load_run_config(legal("--cuda-graph", *words.split()), None).config
    assert list(broken_rules(config, None)) == []
