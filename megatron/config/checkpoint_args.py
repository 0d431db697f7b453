"""`--use-checkpoint-args`: the flags of the model and its tokenizer, out of the checkpoint that `--load` names.

Only config.json is read here, before anything else of the run exists. Which checkpoint is loaded is decided later, by
all ranks; that one is compared with what came of these flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.flags import Flag
from megatron.config.sections import flags_in

LONGEST_NAME = 128
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""Of a checkpoint: it cannot leave the folder."""

TOKENIZER_FIELDS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")


def checkpoint_args(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Read what a command line leaves to the checkpoint.

    A flag that is given wins; where that makes another model of it, the load says so. The tokenizer is taken as a
    whole, when none of its flags is given.

    Args:
        given: values by field name.

    Returns:
        the values by field name, and the file they are from; nothing where there is no checkpoint and need not be one.

    Raises:
        ConfigError: no `--load`, no checkpoint there, or its config cannot be read.
    """
    load = given.get("load")
    if load is None:
        raise ConfigError(["--use-checkpoint-args has no effect without --load."])
    file = next((path for path in _configs(Path(load), given.get("load_tag")) if path.is_file()), None)
    if file is None:
        if given.get("load_if_exists"):
            return {}, ""
        raise ConfigError([f"--use-checkpoint-args: --load {load} holds no checkpoint with a config.json."])
    sections = _read(file)
    wanted = list(flags_in("model"))
    if not any(given.get(name) is not None for name in TOKENIZER_FIELDS):
        wanted += [flag for flag in flags_in("data") if flag.name in TOKENIZER_FIELDS]
    values = {flag.name: _value(flag, sections[flag.section], file) for flag in wanted}
    return {name: value for name, value in values.items() if value is not None and name not in given}, str(file)


def _configs(root: Path, tag: str | None) -> Iterator[Path]:
    """Give the config files that may be meant: of the tag, of the folder itself, of the newest checkpoint in it."""
    if tag is not None:
        if NAME.fullmatch(tag):
            yield root / tag / "config.json"
        return
    yield root / "config.json"
    if NAME.fullmatch(pointer := _pointer(root / "latest")):
        yield root / pointer / "config.json"
    yield from sorted(root.glob("step_*/config.json"), reverse=True)


def _pointer(file: Path) -> str:
    """Read the name in a small regular file; where it is none, such as a pipe, the names of the folder tell."""
    try:
        if file.is_symlink() or not file.is_file():
            return ""
        with open(file, "rb") as opened:
            return opened.read(LONGEST_NAME).decode().strip()
    except (OSError, ValueError):
        return ""


def _read(file: Path) -> dict[str, Mapping[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        sections = {name: content[name] for name in ("model", "data")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"--use-checkpoint-args: {file} is no config of a run ({error!r})."]) from None
    if not all(isinstance(section, Mapping) for section in sections.values()):
        raise ConfigError([f"--use-checkpoint-args: {file} is no config of a run."])
    return sections


def _value(flag: Flag, section: Mapping[str, Any], file: Path) -> Any:
    if section.get(flag.name) is None:
        return None
    try:
        return flag.from_json(section[flag.name])
    except ValueError as error:
        raise ConfigError([f"--use-checkpoint-args: {flag.name!r} in {file}: {error}."]) from None
