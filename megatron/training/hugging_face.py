"""`--save-hf`: every checkpoint once more as a model of Hugging Face, made while the training goes on.

    <save>/hf/step_0000010/    what `AutoModelForCausalLM.from_pretrained` opens

It is made from the complete checkpoint, by the first rank, a tensor at a time, and has its name when it is whole. A
copy goes with its checkpoint: what `--keep-last` has removed is removed here. A copy that cannot be made is told and
missing; the checkpoint and the training are as they were.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.store import Saved
from megatron.config.data import DataConfig
from megatron.config.errors import UserError
from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.exporting import HIDDEN_SUFFIX, export_model
from megatron.convert.hugging_face.registry import family_for
from megatron.engine.interface import Engine
from megatron.training.state import TrainState

FOLDER = "hf"
CLOSING_SECONDS = 20.0
"""How long a run that ends with an error lets a copy that is under way go on."""

Export = Callable[[Path, Path], str]
"""Makes of a checkpoint a folder, and says what it made."""


class SavesCheckpoints(Protocol):
    """What saves, as `CheckpointWriter` does."""

    def save(self, engine: Engine, state: TrainState) -> list[Saved]:
        """Save, or begin to."""

    def poll(self) -> list[Saved]:
        """Return what became complete."""

    def finish(self) -> list[Saved]:
        """Wait for what is under way."""

    def close(self) -> None:
        """Let go."""


def build_export(model: ModelConfig, data: DataConfig, precision: str) -> Export:
    """Make what writes a checkpoint of this run as a model of Hugging Face, in the run's precision.

    Raises:
        UserError: no family of theirs has what the model has.
    """
    family_for(model)  # told at the start instead of at the first save

    def export(source: Path, target: Path) -> str:
        made = export_model(open_tensors(source), target, model=model, data=data, precision=precision, replace=True)
        return f"{made.model_type} in {precision}, {made.num_bytes / 1e9:.3f} GB"

    return export


class HuggingFaceCopies:
    """Saves as another does, on the first rank, and copies what became complete.

    Args:
        checkpoints: saves.
        root: the folder of `--save`.
        export: makes a copy.
        say: hears what came of it.
    """

    def __init__(self, checkpoints: SavesCheckpoints, root: Path, export: Export, say: Callable[[str], None]) -> None:
        self._checkpoints = checkpoints
        self._root = root
        self._export = export
        self._say = say
        self._thread: threading.Thread | None = None
        self._outcome = ""

    def save(self, engine: Engine, state: TrainState) -> list[Saved]:
        """Save, or begin to, when the copy under way is done: the save may remove the checkpoint it is made from."""
        self._wait()
        return self._copy(self._checkpoints.save(engine, state))

    def poll(self) -> list[Saved]:
        """Return what became complete since the last step, and copy it."""
        if self._thread is not None and not self._thread.is_alive():
            self._wait()
        return self._copy(self._checkpoints.poll())

    def finish(self) -> list[Saved]:
        """Wait for the save and the copy that are under way."""
        saved = self._copy(self._checkpoints.finish())
        self._wait()
        return saved

    def close(self) -> None:
        """Let what is under way go on for some seconds, when the run ends without having waited for it."""
        self._checkpoints.close()
        if self._thread is not None:
            self._thread.join(CLOSING_SECONDS)

    def _copy(self, saved: list[Saved]) -> list[Saved]:
        for one in saved:
            self._wait()
            self._thread = threading.Thread(
                target=self._work, args=(one.path,), name=f"copy {one.path.name}", daemon=True
            )
            self._thread.start()
        return saved

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._say(self._outcome)

    def _work(self, checkpoint: Path) -> None:
        target = self._root / FOLDER / checkpoint.name
        try:
            self._outcome = f" saved {target}: {self._export(checkpoint, target)}"
            self._tidy()
        except (UserError, OSError, RuntimeError) as error:  # the training goes on without the copy
            self._outcome = f" not saved: {target}: {error}"

    def _tidy(self) -> None:
        """Remove copies whose checkpoint is gone, and what killed runs have begun."""
        folder = self._root / FOLDER
        gone = [copy for copy in folder.glob("step_*") if not (self._root / copy.name).exists()]
        for path in (*gone, *folder.glob(f".step_*{HIDDEN_SUFFIX}")):
            shutil.rmtree(path, ignore_errors=True)
