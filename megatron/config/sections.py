"""The run config: the sections together, in the order of the help page."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.engine import EngineConfig
from megatron.config.errors import ConfigError
from megatron.config.flags import Flag, flags_of
from megatron.config.kernels import KernelsConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.reporting import ReportingConfig
from megatron.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that was chosen for one run. A part of the program takes its own section, not this."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    reporting: ReportingConfig = field(default_factory=ReportingConfig)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Give the sections as plain dictionaries, for a checkpoint or a `--config` file."""
        return {section: dataclasses.asdict(getattr(self, section)) for section in SECTIONS}

    @classmethod
    def from_json(cls, sections: Mapping[str, Any]) -> RunConfig:
        """Read back what `to_json` gave, before or after a trip through a JSON file.

        A field that the dictionary lacks takes its default, so that a newer version reads an older run.

        Raises:
            ConfigError: a section or field is unknown, missing without a default, or of the wrong type.
        """
        errors = [f"{name!r} is not a section of a run config." for name in sections if name not in SECTIONS]
        values = {section: _read_section(section, sections.get(section, {}), errors) for section in SECTIONS}
        if errors:
            raise ConfigError(errors)
        return build_sections(values)


SECTIONS: dict[str, Any] = typing.get_type_hints(RunConfig)
"""The sections' classes by their name in the run config."""


@functools.cache
def all_flags() -> Mapping[str, Flag]:
    """Every flag of every section by its field's name, in the order of the sections."""
    return {flag.name: flag for section, cls in SECTIONS.items() for flag in flags_of(section, cls)}


def flags_in(section: str) -> tuple[Flag, ...]:
    """List the flags of one section, in the order of its fields."""
    return tuple(flag for flag in all_flags().values() if flag.section == section)


def build_sections(values: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Make the run config from each section's given fields; derivations across sections are still to be done."""
    return RunConfig(**{section: cls(**values.get(section, {})) for section, cls in SECTIONS.items()})


def _read_section(section: str, raw: Any, errors: list[str]) -> dict[str, Any]:
    """Convert one section's dictionary to field values; what is wrong with it goes to `errors`."""
    if not isinstance(raw, Mapping):
        errors.append(f"section {section!r} of the run config is {raw!r}, not a dictionary.")
        return {}
    known = {flag.name: flag for flag in flags_in(section)}
    errors += [f"{name!r} is not a field of section {section!r}." for name in raw if name not in known]
    errors += [
        f"section {section!r} lacks {name!r}, which has no default."
        for name, flag in known.items()
        if flag.required and name not in raw
    ]
    values = {}
    for name, flag in known.items():
        if name in raw:
            try:
                values[name] = flag.from_json(raw[name])
            except ValueError as error:
                errors.append(f"{name!r} of section {section!r}: {error}.")
    return values
