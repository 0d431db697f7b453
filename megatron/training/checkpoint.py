"""What of a run goes into its checkpoints; `megatron.checkpoint.store` makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron.checkpoint.fragments import WEIGHT
from megatron.checkpoint.store import CheckpointStore, Saved, Snapshot
from megatron.engine.interface import Engine
from megatron.training.state import TrainState


class Streams(Protocol):
    """Random streams, as tensors and numbers."""

    def state_dict(self) -> dict[str, Any]:
        """Give the state of every stream."""


def nothing_more() -> Mapping[str, Any]:
    """Say no more than counters, layout and engine."""
    return {}


class CheckpointWriter:
    """Writes a run's checkpoints. Every rank has one, and all save together.

    Args:
        store: makes them.
        layout: how the ranks share the state, JSON.
        streams: this rank's random streams; None leaves them out.
        save_optimizer: whether the optimizer's state is saved as well.
        more: further entries of state.json, asked on every rank at each save.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        layout: Mapping[str, Any],
        streams: Streams | None,
        save_optimizer: bool = True,
        more: Callable[[], Mapping[str, Any]] = nothing_more,
    ) -> None:
        self._store = store
        self._layout = layout
        self._streams = streams
        self._save_optimizer = save_optimizer
        self._more = more

    def tidy(self, resumed: Path) -> None:
        """See `CheckpointStore.tidy`."""
        self._store.tidy(resumed)

    def save(self, engine: Engine, state: TrainState) -> list[Saved]:
        """Save, or begin to; see `CheckpointStore.save`."""
        more = dict(self._more())  # first: it may take the model through a step, which ends the views of its state
        fragments = [
            fragment for fragment in engine.state_fragments() if self._save_optimizer or fragment.kind == WEIGHT
        ]
        described = {"counters": state.to_json(), "layout": dict(self._layout), "engine": engine.state()}
        return self._store.save(
            Snapshot(
                iteration=state.iteration,
                fragments=fragments,
                state={**described, **more},
                streams=None if self._streams is None else self._streams.state_dict(),
            )
        )

    def poll(self) -> list[Saved]:
        """Return what became complete since the last step; see `CheckpointStore.poll`."""
        return self._store.poll()

    def finish(self) -> list[Saved]:
        """Wait for what is under way; see `CheckpointStore.finish`."""
        return self._store.finish()

    def close(self) -> None:
        """See `CheckpointStore.close`."""
        self._store.close()
