"""Random streams of a rank in a file: the tensors as tensors, the numbers as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import Digest, write_tensors
from megatron.checkpoint.names import rng_file, size_of
from megatron.checkpoint.schema import COUNT, NUMBER, Entries, Nullable, Shape, counts, require

NUMBERS = "numbers"
"""Key of the header under which the numbers are."""


def _vector(dtype: torch.dtype, length: int | None = None) -> Shape:
    def fits(value: object) -> bool:
        is_one = isinstance(value, Tensor) and value.dtype is dtype and value.dim() == 1
        return is_one and length in (None, len(value))  # type: ignore[arg-type]

    return Shape(f"a tensor of {'' if length is None else f'{length} '}{str(dtype).removeprefix('torch.')}", fits)


WORDS = 624
"""Of the state of a Mersenne twister, which numpy and Python draw from."""

STREAMS = Entries(
    {
        "cpu": _vector(torch.uint8),
        "numpy": Entries(
            {
                "key": _vector(torch.int64, WORDS),
                "position": counts(0, WORDS),  # numpy reads there without looking
                "has_gauss": counts(0, 1),
                "gauss": NUMBER,
            }
        ),
        "python": Entries({"version": COUNT, "key": _vector(torch.int64, WORDS + 1), "gauss": Nullable(NUMBER)}),
    },
    {"device": _vector(torch.uint8)},
)
"""What `megatron.parallel.random.RandomStreams` keeps."""


def write_streams(path: Path, streams: Mapping[str, Any]) -> Digest:
    """Write the state of a rank's streams.

    Args:
        path: the file.
        streams: tensors, numbers and None, by name; dictionaries of them may be nested.
    """
    leaves = dict(_leaves(streams, ""))
    tensors = {name: value for name, value in leaves.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in leaves.items() if not isinstance(value, Tensor)}
    return write_tensors(path, tensors, {NUMBERS: json.dumps(numbers)})


def has_streams(folder: Path, rank: int) -> bool:
    """Whether a checkpoint holds the streams of this rank."""
    return size_of(folder / rng_file(rank)) is not None


def read_streams(folder: Path, rank: int) -> dict[str, Any]:
    """Read the random streams that a rank saved, as they were given to `write_streams`.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    path = folder / rng_file(rank)
    streams: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt") as file:
            leaves = json.loads((file.metadata() or {})[NUMBERS])
            leaves |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        for name, value in leaves.items():
            *groups, last = name.split(".")
            place = streams
            for group in groups:
                place = place.setdefault(group, {})
            place[last] = value
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} holds no random streams ({type(error).__name__}: {error}): load another checkpoint, or give "
            "--no-load-rng"
        ) from error
    require(streams, STREAMS, path)
    return streams


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
