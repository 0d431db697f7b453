"""Certify a layout: train a small copy of a run on one rank and on the layout's ranks, and compare."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from megatron.config import scaled_down
from megatron.config.deepspeed_json import read_deepspeed_json
from megatron.config.derived import data_parallel_size
from megatron.config.errors import ConfigError
from megatron.config.rules import check_rules
from megatron.config.sections import RunConfig
from megatron.data.indexed import IndexedDatasetWriter
from megatron.engine.launch import device_type
from megatron.engine.launchers import RankEnvironment
from megatron.engine.local_ranks import run_local_ranks
from megatron.training.certificate import Certificate, Finding, Trained, compare, compare_gradients
from megatron.training.random_draws import Draws, compare_draws
from megatron.training.recorded_run import Record, record_run

PATIENCE_SECONDS = 300.0
NUM_DOCUMENTS = 400


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be certified.

    Attributes:
        whole: the user's run.
        small: the same, scaled down, without dropout.
        ranks: processes of the layout.
    """

    whole: RunConfig
    small: RunConfig
    ranks: int

    @property
    def precisions(self) -> list[str]:
        """fp32, in which every defect shows, and the user's own where that is another."""
        return list(dict.fromkeys(["fp32", scaled_down.precision_of(self.small)]))

    @property
    def draws(self) -> bool:
        """Whether the user's run drops anything, and streams can be compared."""
        return bool(self.whole.model.attention_dropout or self.whole.model.hidden_dropout)

    @property
    def replays(self) -> bool:
        """Whether recompute has masks to draw again."""
        return self.draws and self.small.kernels != scaled_down.without_recompute(self.small.kernels)


@dataclass(kw_only=True)
class RankAnswer:
    """What one rank of the layout recorded.

    Attributes:
        trained: by precision.
        draws: its dropout masks, where the run has dropout.
        replayed: gradients under dropout with recompute and without it, where the run has both.
    """

    trained: dict[str, Trained] = field(default_factory=dict)
    draws: Draws | None = None
    replayed: tuple[Record, Record] | None = None


def prepare(config: RunConfig, *, ranks: int | None, steps: int, folder: Path) -> Task:
    """Scale a run down and write the files that it reads.

    Args:
        config: complete and legal.
        ranks: processes of the layout; None: as few as show it.
        steps: optimizer steps.
        folder: for the files; stays as long as the task.

    Raises:
        ConfigError: the ranks are no multiple of the layout's, the small run would break a rule, or this host cannot
            run it.
    """
    parallel, prefix = config.parallel, folder / "text"
    ranks = ranks or scaled_down.smallest_world(parallel, config.engine.zero_stage)
    small = scaled_down.scale_down(
        config, data_size=data_parallel_size(parallel, ranks), steps=steps, data_prefix=str(prefix)
    )
    check_rules(small, ranks)
    _check_devices(config.training.precision, ranks)
    write_text(prefix, vocab_size=small.data.vocab_size or 0, seq_length=small.data.seq_length)
    settings, file = _own_settings(config), folder / "deepspeed.json"
    file.write_text(json.dumps(settings))
    engine = replace(small.engine, deepspeed_config=str(file) if settings else None)
    return Task(whole=config, small=replace(small, engine=engine), ranks=ranks)


def certify(task: Task) -> tuple[Task, Certificate]:
    """Train on one rank and on the layout's ranks, and compare.

    Returns:
        the task with the optimizer that was used, and the certificate.

    Raises:
        UserError: the run cannot be built.
        RankFailedError: a rank failed while it trained.
    """
    ((task, alone),) = run_local_ranks(1, be_the_reference, task, timeout=PATIENCE_SECONDS)
    answers = run_local_ranks(task.ranks, be_the_layout, task, timeout=PATIENCE_SECONDS)
    return task, judge(task, alone, answers)


def be_the_reference(environment: RankEnvironment, task: Task) -> tuple[Task, dict[str, Trained]]:
    """Train on one rank in each precision; the task that comes back has the optimizer that every run is to use."""
    configs = {name: scaled_down.on_one_rank(task.small, precision=name) for name in task.precisions}
    gradients = {
        name: record_run(scaled_down.showing_gradients(config), environment) for name, config in configs.items()
    }
    exact = gradients["fp32"]
    count = sum(math.prod(held.sharding.logical_shape) for held in exact.initial.values())
    small = scaled_down.with_gentle_adam(task.small, exact.grad_norms[0], count)
    training = {
        name: record_run(replace(config, optimizer=small.optimizer), environment) for name, config in configs.items()
    }
    trained = {name: Trained(gradient=gradients[name], training=training[name]) for name in configs}
    return replace(task, small=small), trained


def be_the_layout(environment: RankEnvironment, task: Task) -> RankAnswer:
    """Be one of the layout's ranks."""
    answer = RankAnswer()
    for name in task.precisions:
        config = scaled_down.in_precision(task.small, name)
        gradient = record_run(scaled_down.showing_gradients(config), environment)
        answer.trained[name] = Trained(gradient=gradient, training=record_run(config, environment))
    if not task.draws:
        return answer
    dropping = scaled_down.with_dropout(scaled_down.showing_gradients(task.small), task.whole.model)
    answer.draws = Draws(coordinates=answer.trained["fp32"].training.coordinates)
    record_run(_keeping_activations(dropping), environment, watch=answer.draws.watch)
    if task.replays:
        exact = scaled_down.in_precision(dropping, "fp32")
        answer.replayed = record_run(exact, environment), record_run(_keeping_activations(exact), environment)
    return answer


def _keeping_activations(config: RunConfig) -> RunConfig:
    return replace(config, kernels=scaled_down.without_recompute(config.kernels))


def judge(task: Task, alone: dict[str, Trained], answers: Sequence[RankAnswer]) -> Certificate:
    """Compare what the ranks recorded."""
    return Certificate(findings=list(_findings(task, alone, answers)), peak_gib=_peaks(task, alone, answers))


def _findings(task: Task, alone: dict[str, Trained], answers: Sequence[RankAnswer]) -> Iterator[Finding]:
    for name in task.precisions:
        yield from compare(name, [answer.trained[name] for answer in answers], same=alone[name], exact=alone["fp32"])
    draws = [answer.draws for answer in answers if answer.draws is not None]
    yield from compare_draws(
        draws, precision=task.small.training.precision, sequence_parallel=task.small.parallel.sequence_parallel
    )
    replayed = [answer.replayed for answer in answers if answer.replayed is not None]
    if replayed:
        yield from compare_gradients("recompute", *zip(*replayed, strict=True))


def _peaks(task: Task, alone: dict[str, Trained], answers: Sequence[RankAnswer]) -> dict[str, list[float]]:
    precision = scaled_down.precision_of(task.small)
    records = {
        "one rank": [alone[precision].training],
        "layout": [answer.trained[precision].training for answer in answers],
    }
    peaks = {name: [record.peak_gib for record in found] for name, found in records.items()}
    return {name: [peak for peak in found if peak is not None] for name, found in peaks.items() if None not in found}


def write_text(prefix: Path, *, vocab_size: int, seq_length: int) -> None:
    """Write documents of random ids, in some of which most tokens end a document and count for nothing."""
    random = np.random.default_rng(0)
    end = vocab_size - 1
    with IndexedDatasetWriter(prefix, np.uint16) as file:
        for _ in range(NUM_DOCUMENTS):
            ids = random.integers(end, size=seq_length)
            ids[random.random(seq_length) < random.random() ** 2] = end
            file.add_document(ids.astype(np.uint16))


def _check_devices(precision: str, ranks: int) -> None:
    if device_type() == "cpu":
        if precision == "fp16":
            raise ConfigError(["--precision fp16 needs GPUs, of which none is here: verify with --precision bf16."])
    elif torch.cuda.device_count() < ranks:
        raise ConfigError(
            [
                f"the layout takes {ranks} ranks and {torch.cuda.device_count()} GPUs are here: give fewer with "
                "--ranks, or set DS_ACCELERATOR=cpu to verify it on the CPU."
            ]
        )


def _own_settings(config: RunConfig) -> dict[str, object]:
    """Give what the user's DeepSpeed file says beyond the flags; small weights are to be sharded by ZeRO-3 as well."""
    file = config.engine.deepspeed_config
    settings = {} if file is None else scaled_down.without_flags(read_deepspeed_json(file))
    if config.engine.zero_stage == 3:
        zero = settings.setdefault("zero_optimization", {})
        zero.pop("param_persistence_threshold", None)
        zero["stage3_param_persistence_threshold"] = 0
    return settings
