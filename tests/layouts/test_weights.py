"""Weights that tensor ranks shared are read as one rank would have saved them, bit for bit, and write the same text."""

import shlex
from pathlib import Path

import pytest
import torch

from tests.layouts.recorded import COMMON, MODELS
from tests.ranks import run_on_ranks
from tests.training.runs import run
from tools import generate_text

SINGLE_HEAD = [*MODELS["llama"], "--num-key-value-heads", "1"]
ALL_MODELS = MODELS | {"one key/value head": SINGLE_HEAD}
TENSOR = "--tensor-model-parallel-size 2"
SHARDED = f"{TENSOR} --sequence-parallel"
STAGES = "--pipeline-model-parallel-size 2"

LAYOUTS = {
    1: [("", model) for model in ALL_MODELS],
    2: [
        (TENSOR, "gpt2"),
        (f"{SHARDED} --zero-stage 0", "gpt2 untied, documents"),
        (f"{TENSOR} --zero-stage 2", "one key/value head"),
        (f"{SHARDED} --zero-stage 3", "llama tied, query norms"),
    ],
    4: [
        (f"{STAGES} {TENSOR}", "gpt2"),
        (f"{STAGES} {SHARDED}", "llama"),
        (f"{TENSOR} --zero-stage 3", "gpt2"),
        (f"{SHARDED} --zero-stage 3", "one key/value head"),
        ("--tensor-model-parallel-size 4", "llama"),
    ],
}


def save_each(cases, folder):
    """Take a step that changes no weight, and save what every layout begins with."""
    still = shlex.split("--lr 0 --min-lr 0 --weight-decay 0 --train-iters 1 --precision bf16")
    for number, (layout, model) in enumerate(cases):
        zero = [] if "--zero-stage 0" not in layout else ["--precision", "fp32"]
        flags = [*COMMON, *ALL_MODELS[model], *still, *shlex.split(layout), *zero]
        assert run([*flags, "--save", f"{folder}/{number}"]) == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint of each layout and model."""
    paths = {}
    for size, cases in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        run_on_ranks(size, save_each, cases, str(folder), initialize=False, deepspeed=True)
        paths |= {case: folder / str(number) for number, case in enumerate(cases)}
    return paths


def load(root: Path):
    path, config = generate_text.open_checkpoint(root)
    return generate_text.load_model(path, config, 29, "cpu")


@pytest.mark.parametrize("case", [*LAYOUTS[2], *LAYOUTS[4]], ids=lambda case: " ".join(case))
def test_joined_weights_are_those_of_one_rank(saved, case):
    joined = load(saved[case]).state_dict()
    expected = load(saved["", case[1]]).state_dict()
    assert joined.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(joined[name].to(torch.bfloat16), weight), name


def test_the_text_is_that_of_one_rank(saved, capsys):
    texts = []
    for layout in ("", TENSOR, f"{TENSOR} --zero-stage 3", f"{STAGES} {TENSOR}"):
        flags = ["--load", str(saved[layout, "gpt2"]), "--prompt", "1 2 3", "--max-new-tokens", "6", "--device", "cpu"]
        assert generate_text.main(flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1:] == texts[:1] * 3
    assert len(texts[0].split()) > 3
