"""What a run tells of itself in its checkpoints, so that a later one can prove that it continues it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron.data.batch import Batch
from megatron.engine.interface import Engine
from megatron.parallel.groups import Group
from megatron.training.inputs import Lookahead
from megatron.training.resume import TRAINING
from megatron.training.sample_order import SampleOrder
from megatron.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The evidence.

    Attributes:
        run: what the numbers of its steps depend on, of `describe_run`.
        vocab_size: of its tokenizer.
        samples: those that it trains on next; None where it does not train.
    """

    run: Mapping[str, Any]
    vocab_size: int
    samples: NextSamples | None

    def facts(self) -> dict[str, Any]:
        """Give an entry for state.json; all ranks call it together, at each save."""
        measured = {} if self.samples is None else {"next_samples": self.samples.measure()}
        return {TRAINING: {"run": self.run, "vocab_size": self.vocab_size, **measured}}


class NextSamples:
    """The loss of the samples that are trained on next, as an evaluation finds it: it draws no random number.

    Args:
        engine: has the weights.
        batches: this rank's, from the next sample on.
        micro_batch_size: samples of a micro-batch.
        data: the ranks that share the samples.
    """

    def __init__(self, engine: Engine, batches: Lookahead, *, micro_batch_size: int, data: Group) -> None:
        self._engine = engine
        self._batches = batches
        self._size = micro_batch_size
        self._data = data

    def measure(self, num_samples: int | None = None) -> dict[str, Any]:
        """Give the sum of the token losses over all ranks, bit for bit, with the number of samples and tokens.

        Args:
            num_samples: how many; None: as many as all ranks take at once. Where they fill no round, the last ones are
                masked, so that every layout measures the same samples.
        """
        at_once = self._size * self._data.size
        num_samples = num_samples or at_once
        rounds = -(-num_samples // at_once)
        batches: Sequence[Batch] = self._batches.peek(rounds)
        if num_samples < rounds * at_once:
            batches = [self._masked(batch, index, num_samples) for index, batch in enumerate(batches)]
        loss_sum, tokens = self._engine.evaluate(batches)
        return {"samples": num_samples, "loss_sum": float(loss_sum).hex(), "tokens": int(tokens)}

    def _masked(self, batch: Batch, index: int, num_samples: int) -> Batch:
        first = (index * self._data.size + self._data.rank) * self._size
        counted = (torch.arange(first, first + self._size, device=batch.labels.device) < num_samples).float()
        mask = torch.ones_like(batch.labels, dtype=torch.float32) if batch.loss_mask is None else batch.loss_mask
        return replace(batch, loss_mask=mask * counted[:, None])


def describe_run(
    sections: Mapping[str, Any],
    layout: Mapping[str, int],
    schedule: Schedule,
    order: SampleOrder,
    software: Mapping[str, str],
) -> dict[str, Any]:
    """Say, as JSON, what the numbers of a run's steps depend on.

    Args:
        sections: of the run.
        layout: ranks on each axis.
        schedule: that it follows.
        order: of its samples.
        software: versions, and what was chosen, by name.
    """
    described: dict[str, Any] = {
        "config": {name: values for name, values in sections.items() if name not in ("checkpoint", "reporting")},
        "layout": dict(layout),
        "schedule": schedule.to_json(),
        "order": order.to_json(),
        "software": dict(software),
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(described))  # with lists for tuples
    return as_read_back
