"""What `tensors.json` says: the logical tensors of a checkpoint, and which fragment is in which file.

    {"version": 1, "tensors": {"2.attention.qkv.weight": {
        "logical_shape": [96, 32], "dim": 0, "num_shards": 2, "blocks": [2, 1, 1], "groups": 4, "padding": 0,
        "kinds": {"weight": {"dtype": "F32", "fragments": [[shard, start, length, file, key], ...]}, ...}}, ...}}

All fragments of a tensor are ranges of the shards of one division. It is read as a stranger's: every value is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import DTYPES
from megatron.checkpoint.names import TENSORS, is_name
from megatron.checkpoint.ranges import normalized, shard_numel
from megatron.checkpoint.schema import (
    COUNT,
    TEXT,
    Entries,
    Items,
    MisfitError,
    Named,
    Nullable,
    OneOf,
    Row,
    Shape,
    counts,
    require,
)
from megatron.parallel.sharding import Sharding

VERSION = 1
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
FILE = Shape("the name of a file of its own folder", is_name)


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


class _Tensor(Entries):
    """A tensor, whose fragments are of shards that there are."""

    def __init__(self) -> None:
        fragments = Items(Row(COUNT, COUNT, counts(1), FILE, TEXT))
        kind = Entries({"dtype": OneOf(*TORCH_DTYPES), "fragments": fragments})
        super().__init__(
            {
                "logical_shape": Items(COUNT),
                "dim": Nullable(COUNT),
                "num_shards": counts(1),
                "blocks": Items(counts(1)),
                "groups": counts(1),
                "padding": COUNT,
                "kinds": Named(kind),
            }
        )

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        super().check(value)
        num_shards = _sharding(value).num_shards
        for name, kind in value["kinds"].items():
            for index, (shard, *_) in enumerate(kind["fragments"]):
                if shard >= num_shards:
                    raise MisfitError(
                        f"is {shard}, of {num_shards} shards", "kinds", name, "fragments", str(index), "0"
                    )


TENSORS_FILE = Entries({"version": COUNT, "tensors": Named(_Tensor())})


def parse_tensors(content: Mapping[str, Any], source: object = TENSORS) -> dict[str, StoredTensor]:
    """Read the content of a `tensors.json`.

    Args:
        content: of the file.
        source: the file, for the sentence.

    Raises:
        CheckpointError: it is of another version, or not what this module describes.
    """
    version = content.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{source}: the tensors are written in version {str(version)[:20]} of the format, and this is {VERSION}: "
            "load the checkpoint with the release that wrote it"
        )
    require(content, TENSORS_FILE, source)
    return {name: _tensor(name, value) for name, value in content["tensors"].items()}


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
    return StoredTensor(name, _sharding(value), {kind: _kind(item) for kind, item in value["kinds"].items()})


def _kind(value: Mapping[str, Any]) -> StoredKind:
    fragments = [StoredFragment(*fragment) for fragment in value["fragments"]]
    ordered = sorted(fragments, key=lambda fragment: (fragment.shard, fragment.start))
    return StoredKind(dtype=TORCH_DTYPES[value["dtype"]], fragments=tuple(ordered))


def _sharding(value: Mapping[str, Any]) -> Sharding:
    """Make the division of a tensor of its entries.

    Raises:
        MisfitError: they do not go together.
    """
    shape, dim = tuple(value["logical_shape"]), value["dim"]
    sharding = Sharding(
        logical_shape=shape,
        dim=dim,
        num_shards=value["num_shards"],
        blocks=tuple(value["blocks"]),
        groups=value["groups"],
        padding=value["padding"],
    )
    if dim is not None and dim >= len(shape):
        raise MisfitError(f"is {dim}, and the shape has {len(shape)} dimensions", "dim")
    if sharding != normalized(sharding) or (dim is not None and sharding.num_shards > shape[dim]):
        raise MisfitError(
            f"is {sharding.num_shards}, and the shape {list(shape)} has no such parts along {dim}", "num_shards"
        )
    if sharding.padding > (0 if dim is None else shape[dim]):
        raise MisfitError(
            f"is {sharding.padding}, more than there is along {dim} of the shape {list(shape)}", "padding"
        )
    try:
        shard_numel(sharding)
    except ValueError as error:
        raise MisfitError(f"does not divide the shape ({error})", "groups") from None
    return sharding
