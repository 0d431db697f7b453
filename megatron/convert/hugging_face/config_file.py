"""Their config.json, read with the family's defaults; what it asks for and this model lacks is refused by key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.convert.hugging_face.errors import ConvertError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MISSING: Any = object()
LARGEST_NUMBER, LARGEST_SIZE = 1e308, 2**24
"""JSON has numbers of any length; products of a few sizes have to be numbers of bytes."""


class TheirConfig:
    """The keys of a config.json.

    Args:
        values: what the file holds.
        source: its path, for sentences.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, key: str, default: Any = MISSING) -> Any:
        """Read a key; `null` is as good as absent.

        Raises:
            ConvertError: it is absent and has no default.
        """
        value = self.values.get(key)
        if value is not None:
            return value
        if default is MISSING:
            raise ConvertError(f"{self.source} lacks {key}: it is no complete config of such a model")
        return default

    def number(self, key: str, default: Any = MISSING) -> Any:
        """Read a key whose value is a number.

        Raises:
            ConvertError: it is another kind of value, or absent without a default.
        """
        value = self.get(key, default)
        if value is not default and not (type(value) in (int, float) and abs(value) <= LARGEST_NUMBER):
            raise ConvertError(f"{self.source}: {key} is {_shown(value)}, which is no number")
        return value

    def count(self, key: str, default: Any = MISSING) -> Any:
        """Read a key whose value is a size or a number of things.

        Raises:
            ConvertError: it is no whole number, or absent without a default.
        """
        value = self.get(key, default)
        if value is not default and not (type(value) is int and 0 < value <= LARGEST_SIZE):
            raise ConvertError(
                f"{self.source}: {key} is {_shown(value)}, which is no whole number from 1 to {LARGEST_SIZE}"
            )
        return value

    def switch(self, key: str, default: bool) -> bool:
        """Read a key that is true or false.

        Raises:
            ConvertError: it is neither.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConvertError(f"{self.source}: {key} is {_shown(value)}, which is neither true nor false")
        return value

    def choose(self, key: str, choices: Mapping[Any, Any], default: Any) -> Any:
        """Translate the value of a key.

        Raises:
            ConvertError: the value is none of the choices.
        """
        value = self.get(key, default)
        if isinstance(value, list | dict) or value not in choices:
            known = ", ".join(map(repr, choices))
            raise ConvertError(f"{self.source}: {key} is {_shown(value)}, and only {known} can be converted")
        return choices[value]

    def require(self, **expected: Any) -> None:
        """Check that keys have the only value that can be converted, or are absent.

        Raises:
            ConvertError: names the key and its value.
        """
        for key, value in expected.items():
            if self.get(key, value) != value:
                raise ConvertError(
                    f"{self.source}: {key} is {_shown(self.values[key])}, and only {value!r} can be converted: this "
                    "model has nothing that computes it"
                )

    def refuse(self, **reasons: str) -> None:
        """Check that keys are absent, null, false or empty.

        Raises:
            ConvertError: says of the first one that is not what it would need.
        """
        for key, reason in reasons.items():
            if self.values.get(key):
                raise ConvertError(f"{self.source}: {key} is {_shown(self.values[key])}: {reason}")


def read_their_config(folder: Path) -> TheirConfig:
    """Read the config.json of a folder.

    Raises:
        ConvertError: there is none, it is damaged, or its model has code or quantised weights of its own.
    """
    path = folder / CONFIG
    config = TheirConfig(read_object(path), str(path))
    config.refuse(
        quantization_config="its weights are quantised; give a folder with weights in fp32, bf16 or fp16",
        auto_map="the model comes with code of its own, which is never run; only the families of transformers itself "
        "can be converted",
    )
    return config


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConvertError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConvertError(
            f"{path} does not exist: give a local folder with a model of Hugging Face, as `hf download REPOSITORY "
            "--local-dir FOLDER` makes it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return value
