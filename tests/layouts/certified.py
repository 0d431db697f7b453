"""Certificates inside of test ranks: several layouts, right or with a defect switched on, in one set of processes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.training.certificate import Certificate
from megatron.training.certify import RankAnswer, Task, be_the_layout, be_the_reference, judge, prepare
from tests.layouts.defects import Defect, none
from tests.ranks import run_on_ranks

COMMON = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 8 --num-key-value-heads 4 --seq-length 32 --vocab-size 61
    --mock-data --precision fp32 --train-iters 1 --lr 1e-2 --hidden-dropout 0 --attention-dropout 0
"""

Case = tuple[str, Defect]
"""Name of a task, and what is wrong with it."""


def task_of(flags: str, ranks: int, steps: int, folder: Path) -> Task:
    """Prepare the certificate of a run."""
    from megatron.config.run import load_run_config

    folder.mkdir()
    config = load_run_config([*shlex.split(COMMON), *shlex.split(flags)]).config
    return prepare(config, ranks=ranks, steps=steps, folder=folder)


def certify_all(tasks: Mapping[str, Task], cases: Sequence[Case], backend: str = "gloo") -> list[Certificate]:
    """Give the certificate of each case; all tasks have as many ranks."""
    how: dict[str, Any] = {"backend": backend, "initialize": False, "deepspeed": True, "timeout": 300}
    (references,) = run_on_ranks(1, be_references, dict(tasks), **how)
    (ranks,) = {task.ranks for task in tasks.values()}
    ready = {name: task for name, (task, _) in references.items()}
    answers = run_on_ranks(ranks, be_layouts, ready, list(cases), **how)
    return [
        judge(ready[name], references[name][1], [of_rank[index] for of_rank in answers])
        for index, (name, _) in enumerate(cases)
    ]


def certify_right(tasks: Mapping[str, Task], backend: str = "gloo") -> dict[str, Certificate]:
    """Give the certificates of layouts without defects."""
    return dict(zip(tasks, certify_all(tasks, [(name, none) for name in tasks], backend), strict=True))


def be_references(tasks: dict[str, Task]) -> dict[str, Any]:
    from megatron.engine.launch import read_environment

    return {name: be_the_reference(read_environment(), task) for name, task in tasks.items()}


def be_layouts(tasks: dict[str, Task], cases: list[Case]) -> list[RankAnswer]:
    from megatron.engine.launch import read_environment

    answers = []
    for name, defect in cases:
        with defect():
            answers.append(be_the_layout(read_environment(), tasks[name]))
    return answers
