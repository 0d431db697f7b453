"""What `tensors.json` says: the logical tensors of a checkpoint, and which fragment is in which file.

    {"version": 1, "tensors": {"2.attention.qkv.weight": {
        "logical_shape": [96, 32], "dim": 0, "num_shards": 2, "blocks": [2, 1, 1], "groups": 4, "padding": 0,
        "kinds": {"weight": {"dtype": "F32", "fragments": [[shard, start, length, file, key], ...]}, ...}}, ...}}

All fragments of a tensor are ranges of the shards of one division. It is read as a stranger's: every value is checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import DTYPES
from megatron.checkpoint.ranges import normalized, shard_numel
from megatron.parallel.sharding import Sharding

VERSION = 1
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
"""A file of the checkpoint's own folder."""


@dataclass(frozen=True)
class StoredFragment:
    """Entries `[start, start + length)` of a shard, under `key` in `file`."""

    shard: int
    start: int
    length: int
    file: str
    key: str


@dataclass(frozen=True)
class StoredKind:
    """One kind of a tensor; fragments ascend by shard and start."""

    dtype: torch.dtype
    fragments: tuple[StoredFragment, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor; `sharding` is that of its first shard."""

    name: str
    sharding: Sharding
    kinds: Mapping[str, StoredKind]

    def shard(self, index: int) -> Sharding:
        """Describe another shard."""
        return replace(self.sharding, rank=index)


def parse_tensors(content: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Read the content of a `tensors.json`.

    Raises:
        CheckpointError: it is of another version, or not what this module describes.
    """
    version = content.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"the checkpoint's tensors are written in version {version!r} of the format, and this is {VERSION}: "
            "load it with the release that wrote it"
        )
    try:
        return {name: _tensor(name, value) for name, value in content["tensors"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"the checkpoint's list of tensors is damaged ({error}): load another one") from error


def check_tiling(tensor: StoredTensor, kind: str) -> None:
    """Raise when an entry of a kind of a tensor is in no fragment, or in two.

    Raises:
        CheckpointError: says which entries, of which shard.
    """
    num_shards = tensor.sharding.num_shards
    ends = [0] * num_shards
    for fragment in tensor.kinds[kind].fragments:
        if fragment.start < ends[fragment.shard]:
            raise CheckpointError(
                f"{_place(tensor, kind, fragment.shard)}: entry {fragment.start} is written twice, the second time in "
                f"{fragment.file}"
            )
        if fragment.start > ends[fragment.shard]:
            raise _missing(tensor, kind, fragment.shard, ends[fragment.shard], fragment.start)
        ends[fragment.shard] += fragment.length
    for shard, end in enumerate(ends):
        size = shard_numel(tensor.shard(shard))
        if end < size:
            raise _missing(tensor, kind, shard, end, size)
        if end > size:
            raise CheckpointError(f"{_place(tensor, kind, shard)} has {size} entries, and {end} are written")


def _missing(tensor: StoredTensor, kind: str, shard: int, start: int, stop: int) -> CheckpointError:
    return CheckpointError(f"{_place(tensor, kind, shard)}: entries {start} to {stop - 1} are missing")


def _place(tensor: StoredTensor, kind: str, shard: int) -> str:
    return f"{tensor.name} ({kind}), shard {shard} of {tensor.sharding.num_shards}"


def _tensor(name: str, value: Mapping[str, Any]) -> StoredTensor:
    sharding = Sharding(
        logical_shape=tuple(_count(size) for size in value["logical_shape"]),
        dim=None if value["dim"] is None else _count(value["dim"]),
        num_shards=_count(value["num_shards"], least=1),
        blocks=tuple(_count(block, least=1) for block in value["blocks"]),
        groups=_count(value["groups"], least=1),
        padding=_count(value["padding"]),
    )
    if sharding != normalized(sharding):
        raise ValueError(f"{name} is divided over {sharding.num_shards} ranks along no dimension")
    if sharding.dim is not None and sharding.dim >= len(sharding.logical_shape):
        raise ValueError(f"{name} has no dimension {sharding.dim}")
    shard_numel(sharding)  # it must divide
    return StoredTensor(name, sharding, {kind: _kind(sharding, item) for kind, item in value["kinds"].items()})


def _kind(sharding: Sharding, value: Mapping[str, Any]) -> StoredKind:
    fragments = []
    for shard, start, length, file, key in value["fragments"]:
        if not isinstance(file, str) or not FILE.fullmatch(file) or not isinstance(key, str):
            raise ValueError(f"{file!r} is no file of a checkpoint")
        if _count(shard) >= sharding.num_shards:
            raise ValueError(f"shard {shard} of {sharding.num_shards}")
        fragments.append(StoredFragment(shard, _count(start), _count(length, least=1), file, key))
    if value["dtype"] not in TORCH_DTYPES:
        raise ValueError(f"dtype {value['dtype']!r}")
    ordered = sorted(fragments, key=lambda fragment: (fragment.shard, fragment.start))
    return StoredKind(dtype=TORCH_DTYPES[value["dtype"]], fragments=tuple(ordered))


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is no whole number from {least}")
    return value
