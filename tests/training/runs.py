"""Whole runs of a tiny model, started inside a rank's process: what the entry script does, on the same flags."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.config.run import parse_run_config
from megatron.data.indexed import IndexedDatasetWriter
from megatron.engine.launch import read_environment

VOCABULARY = 64

FLAGS = shlex.split(
    """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --make-vocab-size-divisible-by 16
    --micro-batch-size 2 --global-batch-size 8 --rampup-batch-size 4 4 24 --train-iters 12 --precision fp32
    --lr 1e-2 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1
    --start-weight-decay 0.0 --end-weight-decay 0.1 --weight-decay-incr-style linear
    --eval-interval 5 --eval-iters 2 --log-interval 1 --num-workers 0
    """
)
"""Dropout is on, the batch grows from 4 to 8, and weight decay and learning rate change with every step."""


def write_data(prefix: Path) -> list[str]:
    """Write documents of 480 tokens in all, which 12 steps read three times; returns the flags that read them."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as file:
        for _ in range(60):
            file.add_document(random.integers(VOCABULARY - 1, size=8).astype(np.uint16))
    return ["--data-path", str(prefix), "--split", "80,20,0", "--vocab-size", str(VOCABULARY)]


def run(flags: list[str], before_step: Callable[[int], None] | None = None) -> int:
    """Train as `pretrain_gpt.py` does and return the exit code; `before_step` is told each iteration."""
    from megatron.training.build import build_trainer

    environment = read_environment()
    config = parse_run_config(flags, environment.world_size, rank=environment.rank)
    trainer = build_trainer(config, environment)  # a second run of the process stays in its process group
    if before_step is not None:
        train_step = trainer.engine.train_step

        def noted(*args, **kwargs):
            before_step(trainer.state.iteration)
            return train_step(*args, **kwargs)

        trainer.engine.train_step = noted
    return trainer.fit()


def losses(save: Path | str, kind: str = "train") -> dict[int, str]:
    """Read every loss of a run's metrics file, bit for bit; of an iteration that was done twice, the later one."""
    with open(Path(save) / "metrics.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.startswith("{") and line.endswith("}\n")]
    return {
        record["iteration"]: float(record["lm_loss"]).hex() if record["lm_loss"] is not None else "none"
        for record in records
        if record["kind"] == kind
    }


def is_rank(number: int) -> bool:
    return int(os.environ["RANK"]) == number
