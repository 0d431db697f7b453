"""A training in 8 bits goes where the same training in bf16 goes."""

import json
import shlex

import numpy as np

from megatron.data.indexed import IndexedDatasetWriter
from tests.ranks import run_on_ranks
from tests.training.runs import run

FLAGS = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 32 --split 1,0,0
    --make-vocab-size-divisible-by 32 --micro-batch-size 4 --train-iters 60 --lr 5e-3 --min-lr 5e-4
    --lr-decay-style cosine --lr-warmup-iters 5 --hidden-dropout 0 --attention-dropout 0 --eval-iters 0
    --log-interval 15 --num-workers 0 --precision bf16
"""
"""A report averages the losses of 15 steps."""


def write_chain(prefix) -> None:
    """Write a text in which each token allows four next ones, some more often than others."""
    random = np.random.default_rng(0)
    following = random.integers(31, size=(31, 4))
    with IndexedDatasetWriter(prefix, np.uint16) as file:
        for _ in range(100):
            tokens = [0]
            for choice in random.choice(4, p=(0.6, 0.2, 0.15, 0.05), size=300):
                tokens.append(following[tokens[-1], choice])
            file.add_document(np.array(tokens, dtype=np.uint16))


def reported_losses(folder) -> dict[str, list[float]]:
    found = {}
    for name, more in {"bf16": "", "hybrid": "--fp8", "e4m3": "--fp8 --fp8-format e4m3"}.items():
        metrics = folder / f"{name}.jsonl"
        flags = [*shlex.split(f"{FLAGS} {more}"), "--data-path", str(folder / "text"), "--metrics-file", str(metrics)]
        assert run(flags) == 0
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        found[name] = [record["lm_loss"] for record in records if record.get("kind") == "train"]
    return found


def test_the_loss_in_8_bits_is_that_of_bf16_within_half_a_percent(tmp_path):
    write_chain(tmp_path / "text")
    (found,) = run_on_ranks(1, reported_losses, tmp_path, initialize=False, deepspeed=True, timeout=300)
    losses = found.pop("bf16")
    assert losses[-1] < 0.6 * losses[0]
    for name, others in found.items():
        assert abs(others[-1] / losses[-1] - 1) < 5e-3, name
        assert others != losses
