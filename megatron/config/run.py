"""From a command line to a run config: flags, files, derived values, rules."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config import deepspeed_json
from megatron.config.checkpoint_args import checkpoint_args
from megatron.config.config_file import read_config_file
from megatron.config.derived import batch_sizes_from_accumulation, data_parallel_size, derive
from megatron.config.errors import ConfigError, tell
from megatron.config.parallel import ParallelConfig
from megatron.config.parser import format_value, read_words
from megatron.config.rules import check_rules
from megatron.config.sections import SECTIONS, RunConfig, all_flags, build_sections, flags_in

__all__ = ["LoadedConfig", "RunConfig", "build_run_config", "load_run_config", "parse_run_config"]


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A run config, not yet checked against the rules, and how it came about.

    Attributes:
        config: the sections, every derived field filled in.
        sources: where each field's value came from, by field name.
        notes: sentences about ignored flags, to be printed once.
        print_config: whether `--print-config` was given.
    """

    config: RunConfig
    sources: Mapping[str, str]
    notes: tuple[str, ...]
    print_config: bool


def parse_run_config(argv: Sequence[str], world_size: int | None = None, *, rank: int = 0) -> RunConfig:
    """Parse a command line (without the program's name) into a checked run config.

    Prints to stderr the notes on ignored flags and, when something is wrong, every sentence about it, and leaves with
    exit code 2. `--help` and `--print-config` print to stdout and leave with 0.

    Args:
        argv: the words after the program's name.
        world_size: number of ranks; None counts as one data-parallel rank.
        rank: this rank, since what all ranks know is printed by rank 0.
    """
    try:
        loaded = load_run_config(argv, world_size)
        if rank == 0:
            for note in loaded.notes:
                print(note, file=sys.stderr)
            if loaded.print_config:
                print(describe_sources(loaded))
        check_rules(loaded.config, world_size)
    except ConfigError as error:
        tell(error, rank)
        sys.exit(2)
    if loaded.print_config:
        sys.exit(0)
    return loaded.config


def build_run_config(*, world_size: int | None = None, **sections: Any) -> RunConfig:
    """Make a checked run config from section objects, by the names of `RunConfig`'s fields.

    Raises:
        ConfigError: rules are broken; it carries a sentence for each.
    """
    config = derive(RunConfig(**sections), world_size)
    check_rules(config, world_size)
    return config


def load_run_config(argv: Sequence[str], world_size: int | None = None) -> LoadedConfig:
    """Read a command line and the files it names, and derive what was not given; rules are not checked yet.

    The command line wins over `--config`; both must agree with `--deepspeed_config`, which wins over defaults.

    Raises:
        ConfigError: unknown flags, illegal values, unreadable files, contradictions, or missing required flags.
    """
    line = read_words(argv)
    values, sources = dict(line.values), dict.fromkeys(line.values, "flag")
    notes, errors = list(line.notes), list(line.errors)
    if line.config_file:
        file = read_words(read_config_file(line.config_file))
        notes += file.notes
        errors += [f"{line.config_file}: {error}" for error in file.errors]
        values = file.values | values
        sources = dict.fromkeys(file.values, f"file {line.config_file}") | sources
    if errors:
        raise ConfigError(errors)
    if line.use_checkpoint_args:
        saved, checkpoint = checkpoint_args(values)
        values |= saved
        sources |= dict.fromkeys(saved, f"checkpoint {checkpoint}")
    _add_deepspeed_json(values, sources, world_size)
    missing = [flag.spelling for flag in all_flags().values() if flag.required and flag.name not in values]
    if missing:
        raise ConfigError([f"{', '.join(missing)}: required, on the command line or in the --config file."])
    by_section = {
        section: {flag.name: values[flag.name] for flag in flags_in(section) if flag.name in values}
        for section in SECTIONS
    }
    config = derive(build_sections(by_section), world_size)
    return LoadedConfig(
        config=config, sources=_all_sources(config, sources), notes=tuple(notes), print_config=line.print_config
    )


def _add_deepspeed_json(values: dict[str, Any], sources: dict[str, str], world_size: int | None) -> None:
    """Add what the user's DeepSpeed JSON says of the flags to `values`, and where it says so to `sources`."""
    file = values.get("deepspeed_config")
    if file is None:
        return
    user = deepspeed_json.read_deepspeed_json(file)
    merged = deepspeed_json.merge(user, values, file)
    values |= merged.values
    sources |= {name: f"file {file}: {path}" for name, path in merged.paths.items()}
    parallel = ParallelConfig(**{flag.name: values[flag.name] for flag in flags_in("parallel") if flag.name in values})
    implied = batch_sizes_from_accumulation(values, user, data_parallel_size(parallel, world_size), file)
    values |= implied
    sources |= dict.fromkeys(implied, f"file {file}: {deepspeed_json.ACCUMULATION}")


def _all_sources(config: RunConfig, given: Mapping[str, str]) -> dict[str, str]:
    """Say of every field where its value came from: what was given, else a derivation, else the default."""
    sources = {}
    for flag in all_flags().values():
        derived = flag.info.derived is not None and getattr(getattr(config, flag.section), flag.name) is not None
        sources[flag.name] = given.get(flag.name) or (f"derived: {flag.info.derived}" if derived else "default")
    return sources


def describe_sources(loaded: LoadedConfig) -> str:
    """Write every effective value and its source, grouped by section, in aligned columns."""
    rows = [
        (flag.section, flag.name, format_value(getattr(getattr(loaded.config, flag.section), flag.name)))
        for flag in all_flags().values()
    ]
    name_width = max(len(name) for _, name, _ in rows)
    value_width = min(max(len(value) for _, _, value in rows), 32)
    lines = []
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}] {cls.__doc__.splitlines()[0] if cls.__doc__ else ''}"]
        lines += [
            f"  {name:<{name_width}}  {value:<{value_width}}  {loaded.sources[name]}"
            for group, name, value in rows
            if group == section
        ]
    return "\n".join(lines[1:])
