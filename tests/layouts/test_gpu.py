"""Two GPUs train the model that one GPU trains."""

import itertools
import json
import os
import shlex

import pytest
import torch

from tests.layouts import test_half_precision as half
from tests.layouts.recorded import MODELS, Record, record_all
from tests.layouts.test_matrix import IN_PAIRS, SHARDED, STAGES, TENSOR, TWO_RANKS, ULYSSES, errors, flags_of
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.gpu(2)

BOUND = 1e-5
"""Relative error in fp32, as on the CPU; measured 4e-6."""

EXACT = [
    *TWO_RANKS,
    (f"{STAGES} --micro-batch-size 1", "gpt2"),
    ("--zero-stage 3 --micro-batch-size 2 --remote-device cpu", "llama"),
    ("--zero-stage 3 --micro-batch-size 2 --remote-device cpu --cpu-optimizer", "gpt2"),
    (f"--zero-stage 3 --micro-batch-size 1 {IN_PAIRS}", "llama"),
]

HALF = [
    (layout, stage, precision)
    for precision in ("bf16", "fp16")
    for layout, stage in [*itertools.product((TENSOR, SHARDED, ULYSSES), (1, 3)), ("", 1), ("", 2), ("", 3)]
]

QUANTIZED_BOUND = 0.03
"""Relative error of losses and gradient norms when weights travel as 8-bit integers: 1/254 of the largest of each group
of weights is lost, in every product. Measured, losses differ by 4e-3 and norms by 2e-2."""


def train(runs, poisoned_step=None, extensions=None):
    """Train with each list of flags; CUDA code is compiled in `extensions`, not anew by each rank."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if extensions is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    return record_all(runs, poisoned_step)


def on_gpus(number, *args):
    options = {"backend": "nccl", "initialize": False, "deepspeed": True, "timeout": 300.0}
    return run_on_ranks(number, train, *args, **options)[0]


def model_of(layout: str) -> str:
    return half.MODEL_OF.get(layout, "gpt2")


def largest_errors(found: Record, expected: Record) -> tuple[float, str]:
    return max((value, name) for name, value in errors(found, expected).items())


def compare_exact() -> list[tuple[tuple[str, str], float, str]]:
    """Each layout in fp32 with its largest error and where it is."""
    alone = dict(
        zip(MODELS, on_gpus(1, [flags_of("--zero-stage 0 --micro-batch-size 4", m) for m in MODELS]), strict=True)
    )
    found = on_gpus(2, [flags_of(*case) for case in EXACT])
    return [(case, *largest_errors(one, alone[case[1]])) for case, one in zip(EXACT, found, strict=True)]


def compare_half() -> list[tuple[tuple[str, int, str], str, float, float]]:
    """Each layout in half precision: what is compared, its distance from one GPU in fp32, and that of one GPU."""
    models = {model_of(layout) for layout, _, _ in HALF}
    keys = [(model, "fp32", "--zero-stage 0") for model in models]
    keys += [(model, precision, "") for model in models for precision in ("bf16", "fp16")]
    alone = dict(zip(keys, on_gpus(1, [half.flags_of(*key) for key in keys], half.POISONED_STEP), strict=True))
    runs = [
        half.flags_of(model_of(layout), precision, f"{layout} --zero-stage {stage}")
        for layout, stage, precision in HALF
    ]
    bounds: dict[tuple[str, str], float] = {}
    for (model, precision, _), one in alone.items():
        for name, distance in half.distances(one, alone[model, "fp32", "--zero-stage 0"]).items():
            bounds[precision, name] = max(bounds.get((precision, name), 0.0), distance)
    answer = []
    for case, one in zip(HALF, on_gpus(2, runs, half.POISONED_STEP), strict=True):
        exact = alone[model_of(case[0]), "fp32", "--zero-stage 0"]
        assert one.skipped == exact.skipped == [half.POISONED_STEP], case
        answer += [(case, name, far, bounds[case[2], name]) for name, far in half.distances(one, exact).items()]
    return answer


def compare_quantized(folder, extensions) -> list[tuple[str, str, list[float], list[float]]]:
    """Losses and gradient norms with weights that travel as 8-bit integers, and with whole ones."""
    cases = list(itertools.product(("bf16", "fp16"), (1, 2)))
    runs = []
    for (precision, secondary), quantized in itertools.product(cases, (True, False)):
        zero = {"stage3_param_persistence_threshold": 10, "zero_hpz_partition_size": secondary}
        file = folder / f"{secondary}_{quantized}.json"
        file.write_text(json.dumps({"zero_optimization": {**zero, "zero_quantized_weights": quantized}}))
        options = f"--precision {precision} --zero-stage 3 --micro-batch-size 2 --initial-loss-scale 256"
        runs.append([*MODELS["llama"], *shlex.split(f"{options} --lr 0.1 --min-lr 0.1 --deepspeed_config {file}")])
    records = on_gpus(2, runs, None, str(extensions))
    answer = []
    for (precision, secondary), found, whole in zip(cases, records[::2], records[1::2], strict=True):
        where = f"{precision}, secondary partition of {secondary}"
        answer.append((where, "losses", found.losses, whole.losses))
        answer.append((where, "gradient norms", found.grad_norms, whole.grad_norms))
    return answer


def test_every_layout_in_fp32():
    wrong = [answer for answer in compare_exact() if not answer[1] <= BOUND]
    assert not wrong


def test_half_precision_is_as_exact_as_on_one_gpu():
    wrong = [answer for answer in compare_half() if not answer[2] <= half.FACTOR * answer[3]]
    assert not wrong


def test_weights_that_travel_as_bytes_train_almost_the_same(tmp_path):
    for where, name, found, wanted in compare_quantized(tmp_path, tmp_path / "extensions"):
        assert found != wanted, "something is to be quantized"
        assert found == pytest.approx(wanted, rel=QUANTIZED_BOUND), (where, name)
