"""Write docs/flags.md and tests/config/flag_surface.txt from the config sections, or check that they are current."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from megatron.config.flags import Flag
from megatron.config.parser import default_text, format_value, metavar
from megatron.config.retired_flags import FATES, REFUSED_VALUES, RENAMED_VALUES, Alias, Fate, Ignored, Refused
from megatron.config.sections import SECTIONS, all_flags, flags_in

ROOT = Path(__file__).resolve().parents[1]
F = TypeVar("F", Alias, Ignored, Refused)
COMMAND = "python tools/generate_flag_reference.py"

INTRODUCTION = f"""# Flags

Written by `{COMMAND}`; do not edit.

A flag may be written with `-` or `_` between its words. It cannot be shortened, and the last of several wins. A switch
has an opposite: `--no-x` for `--x`. Whole numbers may be written like `300e9`.

`--config FILE` reads flags from a JSON or TOML file (`num_layers = 12`, flat or in tables named like the sections
below); the command line wins over it. `--deepspeed_config FILE` is DeepSpeed's own JSON: what it says of a flag holds
where the flag is not given, and must agree with it where it is. `--print-config` prints every effective value with its
source (default, flag, file, derived) and leaves. `--use-checkpoint-args` takes the flags of the model that are not
given, and the tokenizer's when none of them is, from the checkpoint of `--load`.
"""


def main() -> int:
    """Write or check the generated files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is not current")
    check = parser.parse_args().check
    stale = [file for file, content in generated_files().items() if read(file) != content]
    for file in stale:
        name = file.relative_to(ROOT)
        if check:
            print(f"{name} is not current: run `{COMMAND}` and commit what it writes.", file=sys.stderr)
        else:
            file.write_text(generated_files()[file], encoding="utf-8")
            print(f"wrote {name}")
    return int(check and bool(stale))


def read(file: Path) -> str | None:
    """Give a file's text; None when there is no file."""
    return file.read_text(encoding="utf-8") if file.exists() else None


def generated_files() -> dict[Path, str]:
    """Give the content of every generated file by its path."""
    return {
        ROOT / "docs/flags.md": "\n".join(reference()).rstrip() + "\n",
        ROOT / "tests/config/flag_surface.txt": "\n".join(surface()) + "\n",
    }


def reference() -> Iterator[str]:
    """Give the lines of the reference: the flags by section, then the older spellings by fate."""
    yield INTRODUCTION
    for section, cls in SECTIONS.items():
        yield f"## {cls.title.capitalize()}\n\n{cls.__doc__}\n"
        rows = ((spellings(flag), values(flag), default(flag), flag.info.help) for flag in flags_in(section))
        yield from table(("flag", "values", "default", "meaning"), rows)
    yield "## Older spellings\n\nRead in place of today's words:\n"
    yield from table(("older", "today"), ((code(name, fate), f"`{today(fate)}`") for name, fate in of(Alias)))
    renamed = (
        (f"`--{old}`", ", ".join(f"`{a}` is `{b}`" for a, b in names.items())) for old, names in renamed_values()
    )
    yield from table(("flag", "older values"), renamed)
    yield "Ignored, with a note that says why nothing is lost:\n"
    yield from table(("older", "why"), ((code(name, fate), fate.reason or "no note") for name, fate in of(Ignored)))
    yield "Refused, with advice; some name features that a later version brings:\n"
    yield from table(("older", "accepted values", "advice"), refused_rows())


def renamed_values() -> Iterator[tuple[str, dict[str, str]]]:
    """Give the renamed values by the flag's name with dashes."""
    return ((name.replace("_", "-"), names) for name, names in RENAMED_VALUES.items())


def refused_rows() -> Iterator[tuple[str, str, str]]:
    """Give the rows of refused flags, then of refused values of flags that are there."""
    for name, fate in of(Refused):
        yield code(name, fate), ", ".join(f"`{value}`" for value in fate.off), fate.advice
    for field, advice in REFUSED_VALUES.items():
        for value, sentence in advice.items():
            yield f"`{all_flags()[field].spelling} {value}`", "", sentence.removesuffix(".")


def of(kind: type[F]) -> Iterator[tuple[str, F]]:
    """Give the retired flags of one fate, by name."""
    return ((name, fate) for name, fate in sorted(FATES.items()) if isinstance(fate, kind))


def today(fate: Alias) -> str:
    """Write today's words for an older spelling."""
    return " ".join(word.replace("={}", " X") for word in fate.words)


def code(name: str, fate: Fate) -> str:
    """Write a retired flag with a mark for the values it takes."""
    return f"`--{name}{ {0: '', 1: ' X', '*': ' X ...'}[fate.takes] }`"


def spellings(flag: Flag) -> str:
    """Write a flag's spellings."""
    return ", ".join(f"`{spelling}`" for spelling in (flag.spelling, flag.negation) if spelling)


def values(flag: Flag) -> str:
    """Say which values a flag takes."""
    if flag.info.choices:
        return ", ".join(f"`{choice}`" for choice in flag.info.choices)
    repeats = flag.info.num_values
    count = "" if repeats is None else " ..." if repeats == "+" else f" x {repeats}"
    limits = f", {flag.info.range}" if flag.info.range else ""
    return f"{metavar(flag)}{count}{limits}"


def default(flag: Flag) -> str:
    """Say what holds when a flag is not given."""
    if flag.required or flag.info.derived:
        return default_text(flag).removeprefix("default: ")
    return f"`{format_value(flag.default)}`" if flag.default not in (None, ()) else ""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Give the lines of a table, and an empty one after it."""
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    yield ""


def surface() -> Iterator[str]:
    """Give one line a flag: its spelling, values and default; then the retired ones with their fate."""
    for flag in all_flags().values():
        yield f"{flag.spelling} | {metavar(flag) or 'switch'} | {flag.info.num_values or ''} | {default_text(flag)}"
    for name, fate in sorted(FATES.items()):
        words = f" {today(fate)}" if isinstance(fate, Alias) else ""
        yield f"--{name} | retired | {fate.takes} | {type(fate).__name__.lower()}{words}"


if __name__ == "__main__":
    sys.exit(main())
