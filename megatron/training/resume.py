"""Whether a checkpoint fits the run that wants to resume it: every difference, old -> new, in one message."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.config.model import ModelConfig

FREE_TO_CHANGE = frozenset({"attention_dropout", "hidden_dropout", "init_method_std"})
"""Fields of the model that do not change what its weights mean."""

FIXED = {"optimizer": ("optimizer",)}
"""Fields outside the model that decide what the optimizer keeps."""

MODEL_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
"""What a field of the model was in the checkpoints of versions that did not have it."""

SILENT_SECTIONS = frozenset({"checkpoint", "reporting"})


def check_fits(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare the sections that a checkpoint was saved with to those of this run.

    Returns:
        What changed and may, as `--flag old -> new`.

    Raises:
        CheckpointError: something changed that the checkpoint's tensors depend on; lists all of it.
    """
    fatal: list[tuple[str, str]] = []
    harmless: list[tuple[str, str]] = []
    for section, values in current.items():
        old_values = saved.get(section, {})
        for name in sorted(set(values) | set(old_values)):
            old = old_values.get(name, MODEL_DEFAULTS.get(name) if section == "model" else None)
            new = values.get(name)
            if old != new:
                change = f"--{name.replace('_', '-')} {old} -> {new}"
                (fatal if _is_fixed(section, name) else harmless).append((section, change))
    if fatal:
        raise CheckpointError(
            "the checkpoint is of another model or optimizer: "
            + ", ".join(change for _, change in fatal)
            + "; start with the checkpoint's values, or without --load"
        )
    return [change for section, change in harmless if section not in SILENT_SECTIONS]


def _is_fixed(section: str, name: str) -> bool:
    return name not in FREE_TO_CHANGE if section == "model" else name in FIXED.get(section, ())
