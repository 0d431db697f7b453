"""A dataclass field is a command-line flag, under its Megatron name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlagInfo:
    """What the command line and the documentation know of one field beyond its name, type and default."""

    help: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    num_values: int | str | None = None
    parse: Callable[[str], Any] | None = None
    derived: str | None = None


DERIVED: Any = None
"""Default of a field that is computed from others when it is not given; `FlagInfo.derived` says how."""


def flag(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    num_values: int | str | None = None,
    parse: Callable[[str], Any] | None = None,
    derived: str | None = None,
) -> Any:
    """Declare a field of a config section as the flag `--field-name`.

    Args:
        default: value when the flag is absent; without one the flag is required.
        help: one sentence with the unit; the default is added by the help page.
        choices: the legal values of a string field.
        metavar: name of the value in the help page.
        num_values: number of values as in argparse (`3`, `"+"`), for tuple fields.
        parse: turns one command-line word into one value; the annotation's type when absent.
        derived: for a field whose default is `DERIVED`, how it is computed ("4 x hidden size").
    """
    info = FlagInfo(help=help, choices=choices, metavar=metavar, num_values=num_values, parse=parse, derived=derived)
    return dataclasses.field(default=default, metadata={"flag": info})
