"""An imported model trains on in any layout, from the loss that transformers computes; `--save-hf` keeps what came."""

import json
import os

import numpy as np
import pytest
import torch

from megatron.convert.hugging_face.importing import import_model
from megatron.data.indexed import IndexedDatasetWriter
from tests.convert.hugging_face.models import VOCABULARY, write_model
from tests.ranks import run_on_ranks
from tests.training.runs import losses, run

transformers = pytest.importorskip("transformers")

SEQUENCE = 16
LAYOUTS = {
    "llama 3": "--tensor-model-parallel-size 2 --sequence-parallel",
    "llama tied": "--tensor-model-parallel-size 2 --zero-stage 2",
    "gemma": "--pipeline-model-parallel-size 2 --async-save",
    "qwen2": "--zero-stage 3",
    "qwen3": "--ds-sequence-parallel-size 2 --zero-stage 3",
    "gpt2": "--zero-stage 1 --async-save",
    "mistral": "--pipeline-model-parallel-size 2",
}
COMMON = f"""
    --use-checkpoint-args --finetune --seq-length {SEQUENCE} --micro-batch-size 1 --global-batch-size 2 --train-iters 3
    --lr 1e-3 --precision fp32 --num-workers 0 --attention-dropout 0 --hidden-dropout 0
    --log-interval 1 --split 1,0,0 --save-interval 2 --save-hf --keep-last 1
"""


def one_sample() -> np.ndarray:
    return np.random.default_rng(0).integers(VOCABULARY, size=SEQUENCE).astype(np.uint16)


def write_data(prefix) -> None:
    """Write a text that repeats with the length of a sample: whatever the order, all samples are the same."""
    with IndexedDatasetWriter(prefix, np.uint16) as file:
        file.add_document(np.tile(one_sample(), 20))


def train_in_each_layout(folder):
    write_data(folder / f"data_{os.environ['RANK']}")
    data = ["--data-path", str(folder / f"data_{os.environ['RANK']}")]
    codes = []
    for variant, layout in LAYOUTS.items():
        place = folder / variant.replace(" ", "_")
        flags = [*COMMON.split(), *layout.split(), *data, "--load", str(place / "ours"), "--save", str(place / "run")]
        codes.append(run(flags))
    return codes


def their_loss(folder) -> float:
    """Loss of the sample, by their model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    sample = torch.from_numpy(one_sample().astype(np.int64))[None]
    with torch.no_grad():
        logits = model(sample).logits[0]
    return torch.nn.functional.cross_entropy(logits, sample[0].roll(-1)).item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for variant in LAYOUTS:
        place = folder / variant.replace(" ", "_")
        import_model(write_model(place / "theirs", variant), place / "ours")
    for codes in run_on_ranks(2, train_in_each_layout, folder, initialize=False, deepspeed=True, timeout=240):
        assert codes == [0] * len(LAYOUTS)
    return folder


@pytest.mark.parametrize("variant", LAYOUTS)
def test_training_starts_from_the_loss_that_transformers_computes_and_saves_what_it_can_open(trained, variant):
    place = trained / variant.replace(" ", "_")
    ours = {iteration: float.fromhex(loss) for iteration, loss in losses(place / "run").items()}
    assert sorted(ours) == [1, 2, 3]
    assert ours[1] == pytest.approx(their_loss(place / "theirs"), rel=1e-5)
    assert ours[3] < ours[1] - 0.01
    copies = sorted(path.name for path in (place / "run" / "hf").iterdir())
    assert copies == ["step_0000003"]  # with its checkpoint; that of the second step is gone
    assert sorted(path.name for path in (place / "run").glob("step_*")) == copies
    assert their_loss(place / "run" / "hf" / copies[0]) < ours[3]
    config = json.loads((place / "run" / "hf" / copies[0] / "config.json").read_text())
    assert config["vocab_size"] == VOCABULARY
