"""The command line of the sections: its help page, and words turned into values.

`argparse` writes the help page and groups the words by flag. The values are read by the flags themselves, so that
every wrong one is told at once and a config file goes through the same reading as the command line.
"""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron.config import retired
from megatron.config.errors import ConfigError
from megatron.config.flags import Flag, spell
from megatron.config.sections import SECTIONS, all_flags, flags_in

DESCRIPTION = """Pretrain a GPT model: `deepspeed pretrain_gpt.py FLAGS`, or torchrun, or plain python for one rank.
Flags may be written with - or _ between their words; they cannot be shortened; the last of several wins.
Spellings of older systems are read too: docs/flags.md lists them with their fate."""


CHECKPOINT_ARGS = "--use-checkpoint-args"


@dataclass
class Reading:
    """What a list of words says: values by field name, and sentences about the words themselves."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    config_file: str | None = None
    print_config: bool = False
    use_checkpoint_args: bool = False


def read_words(words: Iterable[str]) -> Reading:
    """Read the words of a command line.

    Older spellings are rewritten first (`megatron.config.retired`). `--help` prints the help page and leaves.
    Nothing raises: sentences about unknown flags and illegal values are in `Reading.errors`.
    """
    rewritten = retired.rewrite(words, known=_spellings())
    reading = Reading(notes=rewritten.notes, errors=rewritten.errors)
    reading.errors += [unknown_flag(name) for name in rewritten.unknown]
    try:
        given, stray = build_parser().parse_known_args(rewritten.words)
    except ConfigError as error:
        reading.errors += error.messages
        return reading
    reading.errors += [f"{word!r} follows no flag that takes it." for word in stray]
    named = vars(given)
    reading.config_file = named.pop("config", None)
    reading.print_config = named.pop("print_config", False)
    reading.use_checkpoint_args = named.pop("use_checkpoint_args", False)
    for name, value in named.items():
        _read_value(all_flags()[name], value, reading)
    return reading


def _read_value(flag: Flag, words: Any, reading: Reading) -> None:
    words = retired.rename_values(flag.name, words)
    refusal = retired.refuse_values(flag.name, words)
    if refusal is not None:
        reading.errors.append(f"{flag.spelling}: {refusal}")
        return
    try:
        reading.values[flag.name] = flag.parse(words)
    except ValueError as error:
        reading.errors.append(f"{flag.spelling}: {error}.")


def unknown_flag(name: str) -> str:
    """Say that `name` is no flag, with the nearest ones that are."""
    nearest: list[str] = []
    for candidates in (_spellings(), retired.usable_names()):
        nearest = nearest or difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.65)
    advice = f"did you mean {' or '.join(nearest)}?" if nearest else "--help lists all flags."
    return f"{name} is not a flag: {advice}"


@functools.cache
def _spellings() -> Mapping[str, Flag | None]:
    """Every legal spelling with its flag (None for the flags of the command line itself)."""
    spellings: dict[str, Flag | None] = dict.fromkeys(("--help", "--config", "--print-config", CHECKPOINT_ARGS))
    for flag in all_flags().values():
        spellings[flag.spelling] = flag
        if flag.negation:
            spellings[flag.negation] = flag
    return spellings


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises its complaint instead of leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message}."])


class _Switch(argparse.Action):
    """`--x` for true and `--no-x` for false (the other way round for a field called `no_x`)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, option_string == spell(self.dest))


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all sections, one group of the help page each. Only what was given lands in its result."""
    parser = _Parser(
        prog="pretrain_gpt.py",
        usage="pretrain_gpt.py [--config FILE] --num-layers N --hidden-size N --num-attention-heads N --lr LR ...",
        description=DESCRIPTION,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="JSON or TOML file of flags; the command line wins over it")
    parser.add_argument(
        "--print-config", action="store_true", help="print every effective value and where it came from, and leave"
    )
    parser.add_argument(
        CHECKPOINT_ARGS,
        action="store_true",
        help="take the flags of the model that are not given, and the tokenizer's when none of them is, from the "
        "checkpoint of --load",
    )
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(cls.title, cls.__doc__)
        for flag in flags_in(section):
            _add_flag(group, flag)
    return parser


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    spellings = [flag.spelling, flag.negation] if flag.negation else [flag.spelling]
    options: dict[str, Any] = {"dest": flag.name, "help": describe(flag).replace("%", "%%")}
    if flag.negation:
        options |= {"action": _Switch, "nargs": 0}
    else:
        options |= {"nargs": flag.info.num_values, "metavar": metavar(flag)}
    group.add_argument(*spellings, **options)


def metavar(flag: Flag) -> str:
    """Name the value of a flag on the help page: its choices, its own name for it, or its type."""
    if flag.info.choices:
        return "{" + ",".join(flag.info.choices) + "}"
    return flag.info.metavar or {int: "N", float: "X", str: "TEXT", bool: ""}[flag.type]


def describe(flag: Flag) -> str:
    """Say what a flag is, its legal values, and its default or how that is derived."""
    limits = f"; {flag.info.range}" if flag.info.range else ""
    default = "" if "(default: " in flag.info.help else f" ({default_text(flag)})"
    return f"{flag.info.help}{limits}{default}"


def default_text(flag: Flag) -> str:
    """Say what holds when the flag is not given."""
    if flag.required:
        return "required"
    if flag.info.derived:
        return f"default: {flag.info.derived}"
    return f"default: {format_value(flag.default)}"


def format_value(value: Any) -> str:
    """Write a value the way the command line takes it; nothing for an unset one is `unset`."""
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(format_value(item) for item in value)
    return f"{value:.12g}" if isinstance(value, float) else str(value)
