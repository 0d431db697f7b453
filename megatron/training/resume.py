"""Whether a checkpoint fits the run that wants to resume it: every difference, old -> new, in one message."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.config.model import ModelConfig

FREE_TO_CHANGE = frozenset({"attention_dropout", "hidden_dropout", "init_method_std"})
"""Fields of the model that do not change what its weights mean."""

FIXED = {
    "training": ("precision",),
    "optimizer": ("optimizer",),
    "engine": ("zero_stage", "cpu_optimizer"),
    "parallel": (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "pipeline_partition",
        "ds_sequence_parallel_size",
    ),
}
"""Fields outside the model that decide which files the engine wrote."""

MODEL_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
"""What a field of the model was in the checkpoints of versions that did not have it."""

SILENT_SECTIONS = frozenset({"checkpoint", "reporting"})


def check_fits(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare the sections that a checkpoint was saved with to those of this run.

    Returns:
        What changed and may, as `--flag old -> new`.

    Raises:
        CheckpointError: something changed that the checkpoint's weights or files depend on; lists all of it.
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
            "the checkpoint is of another model or layout: "
            + ", ".join(change for _, change in fatal)
            + "; start with the checkpoint's values, or without --load"
        )
    return [change for section, change in harmless if section not in SILENT_SECTIONS]


def check_layout(saved: Mapping[str, Any], layout: Mapping[str, int]) -> None:
    """Refuse another number of ranks on any axis.

    Args:
        saved: what the checkpoint says; an axis that it does not name had one rank.
        layout: degree of each axis in this run.

    Raises:
        CheckpointError: degrees differ; names each.
    """
    changes = [
        f"{name.replace('_', '-')} {saved.get(name, 1)}, and this run has {size}"
        for name, size in layout.items()
        if saved.get(name, 1) != size
    ]
    if changes:
        ranks = math.prod(int(saved.get(name, 1)) for name in layout)
        raise CheckpointError(
            f"the checkpoint was saved with {'; '.join(changes)}: weights, optimizer state and random streams are "
            f"split over those ranks, so that for now only the same layout resumes; start {ranks} ranks in that layout"
        )


def _is_fixed(section: str, name: str) -> bool:
    return name not in FREE_TO_CHANGE if section == "model" else name in FIXED.get(section, ())
