"""A dataclass field is a command-line flag, under its Megatron name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """The legal values of a number: between `low` and `high`, each end belonging to it unless it is open."""

    low: float = float("-inf")
    high: float = float("inf")
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and value < float("inf")

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"{'above' if self.low_open else 'at least'} {self.low:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"


def at_least(low: float) -> Range:
    """All finite numbers from `low` upwards."""
    return Range(low=low)


POSITIVE = Range(low=0, low_open=True)
NOT_NEGATIVE = Range(low=0)
PROBABILITY = Range(low=0, high=1, high_open=True)
SHARE = Range(low=0, high=1, low_open=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlagInfo:
    """What the command line and the documentation know of one field beyond its name, type and default."""

    help: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    num_values: int | str | None = None
    range: Range | None = None
    derived: str | None = None


LARGEST_INTEGER, LARGEST_FLOAT = 2**63 - 1, 1e308
"""Of a value that is read back: JSON has numbers of any length."""

DERIVED: Any = None
"""Default of a field that is computed from others when it is not given; `FlagInfo.derived` says how."""


def flag(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    num_values: int | str | None = None,
    range: Range | None = None,
    derived: str | None = None,
) -> Any:
    """Declare a field of a config section as the flag `--field-name`.

    Args:
        default: value when the flag is absent; without one the flag is required.
        help: one sentence with the unit; the default is added by the help page.
        choices: the legal values of a field, as words of the command line.
        metavar: name of the value in the help page.
        num_values: number of values as in argparse (`3`, `"+"`), for tuple fields.
        range: the legal values of a number, or of each number of a tuple.
        derived: for a field whose default is `DERIVED`, how it is computed ("4 x hidden size").
    """
    info = FlagInfo(help=help, choices=choices, metavar=metavar, num_values=num_values, range=range, derived=derived)
    return dataclasses.field(default=default, metadata={"flag": info})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag with everything resolved: the section it lives in, the type of one value, and its declaration."""

    section: str
    name: str
    type: type
    repeated: bool
    optional: bool
    default: Any
    info: FlagInfo

    @property
    def spelling(self) -> str:
        """The flag as the help page writes it: `--num-layers`."""
        return spell(self.name)

    @property
    def negation(self) -> str | None:
        """The opposite spelling of a switch: `--no-x` of `--x`, and `--x` of `--no-x`."""
        if self.type is not bool:
            return None
        return spell(self.name.removeprefix("no_") if self.name.startswith("no_") else f"no_{self.name}")

    @property
    def required(self) -> bool:
        """Whether there is neither a default nor a way to compute one."""
        return self.default is dataclasses.MISSING

    def parse(self, words: str | bool | Sequence[str]) -> Any:
        """Turn what the command line gave for this flag into the field's value.

        Raises:
            ValueError: with a sentence, when a word is not of the flag's type or not among its choices.
        """
        if isinstance(words, bool):
            return words
        if isinstance(words, str):
            return self._parse_word(words)
        return tuple(self._parse_word(word) for word in words)

    def from_json(self, value: Any) -> Any:
        """Turn a value that `json` read back into the field's value.

        Raises:
            ValueError: with a sentence, when its type is not the field's.
        """
        if not self.takes(value):
            raise ValueError(f"{value!r} is not {self.type_text}")
        return tuple(value) if self.repeated and value is not None else value

    def takes(self, value: Any) -> bool:
        """Whether a value that `json` read back is of the field's type."""
        if value is None:
            return self.optional or bool(self.info.derived)
        if self.repeated:
            return isinstance(value, list | tuple) and all(self._fits(item) for item in value)
        return self._fits(value)

    @property
    def type_text(self) -> str:
        """The type in words, with its article."""
        one = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}[self.type]
        return f"a list, each {one}" if self.repeated else one

    def _fits(self, value: Any) -> bool:
        if self.type is float:
            return type(value) in (int, float) and -LARGEST_FLOAT <= value <= LARGEST_FLOAT
        if self.type is int:
            return type(value) is int and -LARGEST_INTEGER <= value <= LARGEST_INTEGER
        return type(value) is self.type

    def _parse_word(self, word: str) -> Any:
        parsers: dict[type, Any] = {int: _parse_int, float: _parse_float, str: str}
        value = parsers[self.type](word)
        if self.info.choices and str(value) not in self.info.choices:
            raise ValueError(f"{word!r} is not one of {', '.join(self.info.choices)}")
        return value


def spell(name: str) -> str:
    """Spell a field's name for the command line: `num_layers` is `--num-layers`."""
    return "--" + name.replace("_", "-")


def flags_of(section: str, cls: type) -> tuple[Flag, ...]:
    """Resolve the flags of a section class, in the order of its fields; `section` is its name in the run config."""
    hints = typing.get_type_hints(cls)
    return tuple(
        Flag(
            section=section,
            name=field.name,
            default=field.default,
            info=field.metadata["flag"],
            **_resolve(hints[field.name]),
        )
        for field in dataclasses.fields(cls)
    )


def _resolve(hint: Any) -> dict[str, Any]:
    """Take an annotation apart: `tuple[int, ...]`, `float | None` or a plain type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return {"type": arguments[0], "repeated": True, "optional": False}
    if isinstance(hint, types.UnionType):
        return {"type": arguments[0], "repeated": False, "optional": True}
    return {"type": hint, "repeated": False, "optional": False}


def _parse_int(word: str) -> int:
    """Read `12`, `1_000`, and whole numbers written as floats (`300e9`), as token counts often are."""
    try:
        return int(word)
    except ValueError:
        value = _parse_float(word, kind="an integer")
    if value != value or abs(value) == float("inf") or value != int(value):
        raise ValueError(f"{word!r} is not an integer")
    return int(value)


def _parse_float(word: str, kind: str = "a number") -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{word!r} is not {kind}") from None
