"""Flags of the older systems that are no fields here, each with its fate.

A flag is an alias (its newer words take its place), ignored with one printed note that says why nothing is lost, or
refused with advice. A feature that a later version brings is refused by name until it is there. In the table, `name=`
takes one value, `name*` takes any number, a plain name takes none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.retired_flags import FATES, REFUSED_VALUES, RENAMED_VALUES, Alias, Fate, Ignored, Refused

MANY = "*"


@dataclass
class Rewritten:
    """A command line in today's spellings, and what there is to say about it."""

    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Use:
    """One flag on the command line with the words after it."""

    name: str
    values: tuple[str, ...]
    inline: bool

    @property
    def words(self) -> list[str]:
        return [f"{self.name}={self.values[0]}", *self.values[1:]] if self.inline else [self.name, *self.values]


def rewrite(words: Iterable[str], known: Iterable[str]) -> Rewritten:
    """Put today's words in place of retired flags; `known` are the spellings that stay as they are.

    Nothing raises: refusals are in `errors`, names that nobody knows in `unknown`.
    """
    known = frozenset(known)
    result = Rewritten()
    ignored: dict[str, list[str]] = {}
    for use in _uses(words):
        fate = FATES.get(use.name.removeprefix("--").lower())
        if use.name in known or not use.name.startswith("--"):
            result.words += use.words
        elif fate is None:
            result.unknown.append(use.name)
        elif problem := _wrong_values(use, fate):
            result.errors.append(problem)
        else:
            _apply(fate, use, result, ignored)
    result.notes = [_note(names, reason) for reason, names in ignored.items()]
    return result


def _note(names: list[str], reason: str) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} ignored: {reason}."


def usable_names() -> Iterator[str]:
    """Give the retired spellings that still do something, for the search of the nearest name."""
    return (f"--{name}" for name, fate in FATES.items() if isinstance(fate, Alias))


def rename_values(name: str, words: Any) -> Any:
    """Put today's name in place of an older value of field `name` (`RMSNorm` is `rmsnorm`)."""
    renamed: Mapping[str, str] = RENAMED_VALUES.get(name, {})
    return renamed.get(words, words) if isinstance(words, str) else words


def refuse_values(name: str, words: Any) -> str | None:
    """Say why an older value of field `name` is refused; None when it is not."""
    return REFUSED_VALUES.get(name, {}).get(words) if isinstance(words, str) else None


def _uses(words: Iterable[str]) -> Iterator[_Use]:
    """Cut the command line at its flags; `_` in their names becomes `-`."""
    name, values, inline = "", list[str](), False
    for word in words:
        if not word.startswith("--") or word == "--":
            values.append(word)
            continue
        yield from _use(name, values, inline)
        head, equals, value = word.partition("=")
        name, values, inline = head.replace("_", "-"), [value] if equals else [], bool(equals)
    yield from _use(name, values, inline)


def _use(name: str, values: list[str], inline: bool) -> Iterator[_Use]:
    if name:
        yield _Use(name, tuple(values), inline)
    else:
        yield from (_Use(word, (), False) for word in values)


def _wrong_values(use: _Use, fate: Fate) -> str | None:
    """Say what is wrong with the number of values after a retired flag; None when nothing is."""
    if fate.takes == MANY or len(use.values) == fate.takes:
        return None
    expected = "takes no value" if fate.takes == 0 else "takes one value"
    got = " ".join(use.values) if use.values else "nothing"
    return f"{use.name} {expected}, not {got}."


def _apply(fate: Fate, use: _Use, result: Rewritten, ignored: dict[str, list[str]]) -> None:
    """Do to one use of a retired flag what its fate says."""
    if isinstance(fate, Alias):
        words = [word.format(*use.values) for word in fate.words]
        result.words = [*words, *result.words] if fate.yields else [*result.words, *words]
    elif isinstance(fate, Ignored):
        if fate.reason:
            ignored.setdefault(fate.reason, []).append(use.name)
    elif isinstance(fate, Refused) and not _is_off(use, fate):
        result.errors.append(f"{' '.join(use.words)}: {fate.advice}.")


def _is_off(use: _Use, fate: Refused) -> bool:
    return bool(use.values) and all(value.removesuffix(".0") in fate.off for value in use.values)
