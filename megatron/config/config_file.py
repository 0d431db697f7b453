"""`--config FILE`: flags from a JSON or TOML file.

The file holds flag names and values, flat or under the names of the sections (as `RunConfig.to_json` writes them). It
is turned into the words of a command line, so that everything said of flags, older spellings included, holds for it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.flags import spell
from megatron.config.sections import SECTIONS, all_flags

RESERVED = frozenset({"config", "print_config", "use_checkpoint_args", "help"})
"""Flags of the command line itself, which a file cannot set."""


def read_config_file(file: str) -> list[str]:
    """Read a config file as the words of a command line.

    Raises:
        ConfigError: no such file, neither JSON nor TOML, malformed (with its place), or a value that is no flag's.
    """
    content = _parse(file)
    words, errors = [], []
    for name, value in _entries(content):
        if name in RESERVED:
            errors.append(f"{file}: {spell(name)} belongs on the command line, not in a config file.")
        elif isinstance(value, Mapping) or (isinstance(value, list) and not all(map(_is_word, value))):
            errors.append(f"{file}: {name} is {json.dumps(value, default=str)}, which is no value of a flag.")
        else:
            words += _words(name, value)
    if errors:
        raise ConfigError(errors)
    return words


def _parse(file: str) -> dict[str, Any]:
    readers = {".json": json.loads, ".toml": tomllib.loads}
    reader = readers.get(Path(file).suffix)
    if reader is None:
        raise ConfigError([f"--config {file}: the file's name must end in .json or .toml, to say what it is."])
    try:
        content = reader(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"--config {file} cannot be read: {error.strerror}."]) from None
    except ValueError as error:  # both kinds of syntax error, which tell their line and column, and wrong UTF-8
        raise ConfigError([f"--config {file} is not {Path(file).suffix[1:].upper()}: {error}."]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"--config {file} is not a dictionary of flags but a {type(content).__name__}."])
    return content


def _entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give names (with `_`) and values, those under a section's name included."""
    for key, value in content.items():
        if key in SECTIONS and isinstance(value, Mapping):
            yield from ((name.replace("-", "_"), item) for name, item in value.items())
        else:
            yield key.replace("-", "_"), value


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _words(name: str, value: Any) -> list[str]:
    """Write one entry as words: nothing for an unset one, `--x` or `--no-x` for a switch."""
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        return _switch(name, value)
    if isinstance(value, list):
        return [spell(name), *map(str, value)]
    return [f"{spell(name)}={value}"]


def _switch(name: str, on: bool) -> list[str]:
    """Write a switch; an older flag that is off (`swiglu = false`) asks for nothing."""
    if on:
        return [spell(name)]
    flag = all_flags().get(name)
    return [flag.negation or flag.spelling] if flag else []
