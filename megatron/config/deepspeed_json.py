"""The user's DeepSpeed JSON: read it, and say which of its keys speak of the same thing as a flag.

A key that a flag also sets is one fact in two places. If the flag was not given, the file's value is taken. If both
were given and differ, that is an error that names both. The value `"auto"` leaves the fact to the flag.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.flags import spell

ABSENT: Any = object()


@dataclass(frozen=True)
class JsonKey:
    """A key of DeepSpeed's dictionary that sets the field of a section.

    Attributes:
        path: the key with the dictionaries around it, joined by dots.
        field: name of the section's field, which is also the flag's.
        read: turns the JSON's value into the field's; raises ValueError with what it should have been.
    """

    path: str
    field: str
    read: Callable[[Any], Any]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError("a whole number")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return value


def _loss_scale(value: Any) -> float | None:
    return _number(value) or None  # DeepSpeed writes a dynamic loss scale as 0


def _power_of_two(value: Any) -> float:
    return 2.0 ** _whole(value)


def _remote_device(value: Any) -> str:
    if value not in ("none", "cpu", None):
        raise ValueError('"cpu" or "none": this version offloads to the host alone')
    return value or "none"


def _offloads(value: Any) -> bool:
    return _remote_device(value) == "cpu"


def _accumulates_in_fp32(value: Any) -> bool:
    if value not in ("fp32", "float32", "bf16", "bfloat16", "fp16", "float16"):
        raise ValueError('"fp32", "bf16" or "fp16"')
    return value in ("fp32", "float32")


def _optimizer(value: Any) -> str:
    names = {"adam": "adam", "adamw": "adam", "sgd": "sgd"}
    if not isinstance(value, str) or value.lower() not in names:
        raise ValueError('"AdamW" or "SGD"')
    return names[value.lower()]


def _beta(index: int) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError("a list of two numbers")
        return _number(value[index])

    return read


KEYS = (
    JsonKey("train_batch_size", "global_batch_size", _whole),
    JsonKey("train_micro_batch_size_per_gpu", "micro_batch_size", _whole),
    JsonKey("gradient_clipping", "clip_grad", _number),
    JsonKey("zero_optimization.stage", "zero_stage", _whole),
    JsonKey("zero_optimization.reduce_bucket_size", "zero_reduce_bucket_size", _whole),
    JsonKey("zero_optimization.allgather_bucket_size", "zero_allgather_bucket_size", _whole),
    JsonKey("zero_optimization.offload_optimizer.device", "cpu_optimizer", _offloads),
    JsonKey("zero_optimization.offload_param.device", "remote_device", _remote_device),
    JsonKey("data_types.grad_accum_dtype", "accumulate_allreduce_grads_in_fp32", _accumulates_in_fp32),
    JsonKey("fp16.loss_scale", "loss_scale", _loss_scale),
    JsonKey("fp16.initial_scale_power", "initial_loss_scale", _power_of_two),
    JsonKey("fp16.loss_scale_window", "loss_scale_window", _whole),
    JsonKey("fp16.hysteresis", "hysteresis", _whole),
    JsonKey("fp16.min_loss_scale", "min_loss_scale", _number),
    JsonKey("optimizer.type", "optimizer", _optimizer),
    JsonKey("optimizer.params.lr", "lr", _number),
    JsonKey("optimizer.params.betas", "adam_beta1", _beta(0)),
    JsonKey("optimizer.params.betas", "adam_beta2", _beta(1)),
    JsonKey("optimizer.params.eps", "adam_eps", _number),
    JsonKey("optimizer.params.weight_decay", "weight_decay", _number),
    JsonKey("optimizer.params.momentum", "sgd_momentum", _number),
)
"""The keys that set one field each. Precision and gradient accumulation, which take two keys, are read apart."""

OLD_NAMES = {"bfloat16": "bf16"}
"""Top-level keys that DeepSpeed still reads under an older name."""

ACCUMULATION = "gradient_accumulation_steps"

FLAG_PATHS = frozenset(key.path for key in KEYS) | {"bf16.enabled", "fp16.enabled", ACCUMULATION}
"""Every path whose fact a flag owns: after `parse_run_config`, the run config holds its value."""


@dataclass(frozen=True)
class FileValue:
    """A field's value as the file gives it, and the key that gave it."""

    field: str
    value: Any
    path: str


def read_deepspeed_json(file: str | Path) -> dict[str, Any]:
    """Read the user's DeepSpeed JSON.

    Raises:
        ConfigError: there is no such file, it is not JSON (with line and column), or it is not a dictionary.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"--deepspeed-config {file} cannot be read: {error.strerror}."]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"--deepspeed-config {file} is not JSON: it is not UTF-8 text."]) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError([f"--deepspeed-config {file} is not JSON: {error.msg} at {place}."]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"--deepspeed-config {file} is not a JSON dictionary but a {type(content).__name__}."])
    return {OLD_NAMES.get(str(key), str(key)): value for key, value in content.items()}


def look_up(user: Mapping[str, Any], path: str) -> Any:
    """Give the value at a dotted path; `ABSENT` when it is not there or left to the flag with "auto"."""
    value: Any = user
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return ABSENT
        value = value[key]
    return ABSENT if value == "auto" else value


def values_of(user: Mapping[str, Any]) -> Iterator[FileValue]:
    """Give the fields that the file sets.

    Raises:
        ConfigError: a key has a value of the wrong kind; all such keys are named.
    """
    errors, found = [], []
    for key in KEYS:
        raw = look_up(user, key.path)
        if raw is ABSENT:
            continue
        try:
            found.append(FileValue(key.field, key.read(raw), key.path))
        except ValueError as error:
            errors.append(f"{key.path} in --deepspeed-config is {json.dumps(raw)}, which should be {error}.")
    precision = _precision(user, errors)
    if errors:
        raise ConfigError(errors)
    yield from found
    if precision:
        yield precision


def _precision(user: Mapping[str, Any], errors: list[str]) -> FileValue | None:
    """Read `bf16.enabled` and `fp16.enabled`, of which at most one may be on; bf16 switched off alone means fp32."""
    switches = {name: look_up(user, f"{name}.enabled") for name in ("bf16", "fp16")}
    for name, value in switches.items():
        if value is not ABSENT and not isinstance(value, bool):
            errors.append(
                f"{name}.enabled in --deepspeed-config is {json.dumps(value)}, which should be true or false."
            )
    on = [name for name, value in switches.items() if value is True]
    if len(on) > 1:
        errors.append("bf16.enabled and fp16.enabled in --deepspeed-config are both true; switch one of them off.")
    if on:
        return FileValue("precision", on[0], f"{on[0]}.enabled")
    if switches["bf16"] is False:
        return FileValue("precision", "fp32", "bf16.enabled")
    return None


@dataclass(frozen=True)
class Merged:
    """Values with those of the file added, and the key each added one came from."""

    values: dict[str, Any]
    paths: dict[str, str]


def merge(user: Mapping[str, Any], given: Mapping[str, Any], file: str) -> Merged:
    """Add the file's values to the given ones.

    Args:
        user: the user's DeepSpeed dictionary.
        given: values by field name that were given as flags.
        file: name of the JSON, for the sentences.

    Raises:
        ConfigError: file and flags contradict each other, or a key has a value of the wrong kind.
    """
    values, paths, errors = dict(given), dict[str, str](), []
    for item in values_of(user):
        if item.field not in given:
            values[item.field] = item.value
            paths[item.field] = item.path
        elif not _agree(item, given[item.field], user):
            errors.append(_contradiction(item, given[item.field], user, file))
    if errors:
        raise ConfigError(errors)
    return Merged(values, paths)


def _agree(item: FileValue, given: Any, user: Mapping[str, Any]) -> bool:
    if item.field == "precision" and look_up(user, item.path) is False:
        return bool(given != "bf16")  # the file only says what the precision is not
    return bool(item.value == given)


def _contradiction(item: FileValue, given: Any, user: Mapping[str, Any], file: str) -> str:
    raw = json.dumps(look_up(user, item.path))
    said = f"{spell(item.field)} is {json.dumps(given)}"
    return f'{item.path} in {file} is {raw}, but {said}: remove one of them, or set the key to "auto".'


def accumulation_steps(user: Mapping[str, Any]) -> int | None:
    """Give the file's number of micro-batches of one optimizer step on one rank; None when it has none.

    Raises:
        ConfigError: it is not a whole number of at least 1.
    """
    raw = look_up(user, ACCUMULATION)
    if raw is ABSENT:
        return None
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < 1:
        raise ConfigError([f"{ACCUMULATION} in --deepspeed-config is {json.dumps(raw)}; it should be at least 1."])
    return raw
