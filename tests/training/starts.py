"""What a run starts with, when it is built and before it does a step."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.fragments import open_tensors
from megatron.config.errors import UserError
from megatron.config.run import parse_run_config
from megatron.engine.launch import read_environment
from megatron.parallel.sharding import Sharding, describe_sharding
from megatron.training.state import TrainState


@dataclass(frozen=True)
class Start:
    """One rank's start; tensors are small enough to be compared as they are.

    Attributes:
        state: the counters.
        rates: learning rate and weight decay of the first step.
        tokens: of the first micro-batch.
        draws: numbers that are drawn next.
        engine: what `Engine.state` says.
        fragments: what this rank holds, by name, kind and place.
        shardings: of each parameter that the rank holds a part of.
        said: what was printed.
    """

    state: TrainState
    rates: tuple[float, float]
    tokens: list[list[int]]
    draws: list[float]
    engine: dict[str, Any]
    fragments: dict[tuple[str, str, int, int], Tensor]
    shardings: dict[str, Sharding]
    said: str

    def kind(self, *, weights: bool) -> dict[tuple[str, str, int, int], Tensor]:
        """Give the weights, or the optimizer's tensors."""
        return {key: tensor for key, tensor in self.fragments.items() if (key[1] == "weight") == weights}


def start(flags: list[str]) -> Start:
    """Build a run as `pretrain_gpt.py` does, look at it, and leave."""
    from megatron.training.build import build_trainer

    environment = read_environment()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        trainer = build_trainer(parse_run_config(flags, environment.world_size, rank=environment.rank), environment)
        with trainer._resources:
            found = Start(
                state=trainer.state,
                rates=trainer.plan.schedule.at(trainer.state),
                tokens=next(trainer._training_batches).tokens.tolist(),
                draws=torch.rand(4).tolist(),
                engine=trainer.engine.state(),
                fragments={
                    (one.name, one.kind, one.sharding.rank, one.start): one.tensor.detach().clone()
                    for one in trainer.engine.state_fragments()
                },
                shardings=describe_sharding(trainer.engine.module)
                | {one.name: one.sharding for one in trainer.engine.state_fragments()},
                said="",
            )
    return Start(**{**vars(found), "said": said.getvalue()})


def refusal(flags: list[str]) -> str:
    """Build a run that cannot be, and give the sentence."""
    try:
        started = start(flags)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"it started: {started.said}")


def is_of(started: Start, checkpoint: Path, *, weights: bool) -> bool:
    """Whether weights, or the optimizer's tensors, are a checkpoint's, bit for bit."""
    tensors = open_tensors(checkpoint)
    held = started.kind(weights=weights)
    return bool(held) and all(
        torch.equal(tensor, tensors.read(name, kind).flatten()[begin : begin + tensor.numel()])
        for (name, kind, _, begin), tensor in held.items()
    )


def is_fresh(started: Start) -> bool:
    """Whether the optimizer has done no step."""
    return started.engine["optimizer"]["step"] == 0 and all(
        not tensor.any() for tensor in started.kind(weights=False).values()
    )
