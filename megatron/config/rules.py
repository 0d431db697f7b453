"""What must hold in a run config. Every broken rule is told at once, each in a sentence with values and flags.

A rule is a public function of one of the rule modules. It yields a sentence for each way in which it is broken, and
names as its parameters what it looks at: sections of the run config, `data_parallel_size`, `world_size`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from megatron.config import (
    data_rules,
    fp8_rules,
    graph_rules,
    layout_rules,
    model_rules,
    output_rules,
    recompute_rules,
    schedule_rules,
    training_rules,
)
from megatron.config.derived import data_parallel_size
from megatron.config.errors import ConfigError
from megatron.config.flags import Flag
from megatron.config.model import ModelConfig
from megatron.config.sections import SECTIONS, RunConfig, flags_in

__all__ = ["ConfigError", "broken_model_rules", "broken_rules", "check_rules", "rules"]

Rule = Callable[..., Iterator[str]]

RULE_MODULES = (
    model_rules,
    layout_rules,
    fp8_rules,
    graph_rules,
    recompute_rules,
    training_rules,
    schedule_rules,
    data_rules,
    output_rules,
)


def check_rules(config: RunConfig, world_size: int | None = None) -> None:
    """Check a run config against every rule.

    Args:
        config: the sections, derived fields filled in.
        world_size: number of ranks; None when it is not known yet.

    Raises:
        ConfigError: with a sentence for each broken rule.
    """
    broken = list(broken_rules(config, world_size))
    if broken:
        raise ConfigError(broken)


def broken_rules(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """Give a sentence for each broken rule: first the values that are illegal alone, then those that do not fit."""
    known: dict[str, Any] = {section: getattr(config, section) for section in SECTIONS}
    yield from _illegal_values(known)
    known["world_size"] = world_size
    known["data_parallel_size"] = data_parallel_size(config.parallel, world_size)
    for rule in rules():
        with contextlib.suppress(ZeroDivisionError):  # a zero that is illegal has been told already
            yield from rule(**{name: known[name] for name in inspect.signature(rule).parameters})


def broken_model_rules(model: ModelConfig) -> Iterator[str]:
    """Give a sentence for each rule that a model breaks by itself, whatever the run."""
    yield from _illegal_values({"model": model})
    for rule in rules():
        if list(inspect.signature(rule).parameters) == ["model"]:
            with contextlib.suppress(ZeroDivisionError):
                yield from rule(model=model)


def rules() -> Iterator[Rule]:
    """Give every rule between fields, in the order of the modules."""
    for module in RULE_MODULES:
        yield from _rules_of(module)


def _rules_of(module: ModuleType) -> Iterator[Rule]:
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield value


def _illegal_values(sections: Mapping[str, Any]) -> Iterator[str]:
    for flag in (flag for section in sections for flag in flags_in(section)):
        value = getattr(sections[flag.section], flag.name)
        if value is None:
            continue
        for item in value if flag.repeated else (value,):
            yield from _illegal(flag, item)
        count = flag.info.num_values
        if isinstance(count, int) and value and len(value) != count:
            yield f"{flag.spelling} takes {count} values, not {len(value)}."


def _illegal(flag: Flag, value: Any) -> Iterator[str]:
    if flag.info.choices and str(value) not in flag.info.choices:
        yield f"{flag.spelling} {value} is not one of {', '.join(flag.info.choices)}."
    if flag.info.range and value not in flag.info.range:
        yield f"{flag.spelling} {value} must be {flag.info.range}."
