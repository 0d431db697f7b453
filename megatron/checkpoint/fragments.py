"""Logical tensors on disk, in the fragments that many ranks wrote, and read back in whatever parts a rank needs.

A logical tensor is the one that a single rank would have. It has kinds: `weight`, the fp32 master copy, and the
optimizer's, such as `exp_avg`. A rank writes what it owns as fragments: a flat range of its shard over the tensor
ranks. `tensors.json` says which fragment is where; together those of a kind are the tensor, each entry once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import DTYPES, Digest, read_json, write_tensors
from megatron.checkpoint.names import TENSORS
from megatron.checkpoint.ranges import is_whole, normalized, overlaps, rectangles, shard_numel, without_padding
from megatron.checkpoint.table import VERSION, StoredFragment, StoredTensor, check_tiling, parse_tensors
from megatron.parallel.sharding import Sharding

WEIGHT = "weight"
"""The kind of the weights; every other one is the optimizer's."""

LARGEST_FILE = 2 * 2**30
SMALLEST_FILE = 64 * 2**20
WRITING_THREADS = 4


@dataclass(frozen=True)
class Fragment:
    """Entries `[start, start + length)` of a row-major shard of a logical tensor.

    Attributes:
        name: of the parameter.
        kind: `weight`, or the optimizer's name for the state.
        sharding: how the tensor is divided, and which shard this is of.
        start: the first entry.
        tensor: flat, contiguous, `[length]`; in the dtype in which it is kept.
    """

    name: str
    kind: str
    sharding: Sharding
    start: int
    tensor: Tensor


def tensors_file(rank: int, index: int) -> str:
    """Name of a file with fragments that a rank wrote."""
    return f"tensors_{rank:05d}_{index:02d}.safetensors"


def write_fragments(
    folder: Path, rank: int, fragments: Iterable[Fragment]
) -> tuple[list[dict[str, Any]], dict[str, Digest]]:
    """Write what a rank owns, some files at a time, and sync them.

    Returns:
        a JSON record of each fragment, for `describe_tensors`, and the digests of the files by name.

    Raises:
        CheckpointError: a fragment is no flat tensor or of a dtype that the files do not have.
        OSError: a file cannot be written.
    """
    fragments = [fragment for fragment in fragments if fragment.tensor.numel()]
    names = []
    records: list[dict[str, Any]] = []
    shares = list(_shares(fragments))
    for index, share in enumerate(shares):
        names.append(tensors_file(rank, index))
        records += [fragment_record(fragment, names[-1]) for fragment in share]

    def write(name: str, share: Sequence[Fragment]) -> Digest:
        return write_tensors(folder / name, {fragment_key(fragment): fragment.tensor for fragment in share})

    with ThreadPoolExecutor(WRITING_THREADS) as threads:
        digests = list(threads.map(write, names, shares))
    return records, dict(zip(names, digests, strict=True))


def describe_tensors(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the records of all ranks into the content of `tensors.json`.

    Raises:
        CheckpointError: entries of a tensor are missing or written twice, or ranks disagree about it; named.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for record in records:
        name, kind = record["name"], record["kind"]
        sharding = dict(record["sharding"])
        shard = sharding.pop("rank")
        tensor = tensors.setdefault(name, {**sharding, "kinds": {}})
        if {key: tensor[key] for key in sharding} != sharding:
            raise CheckpointError(f"{name} is divided in one way by a rank and in another by the next: {sharding}")
        content = tensor["kinds"].setdefault(kind, {"dtype": record["dtype"], "fragments": []})
        if content["dtype"] != record["dtype"]:
            raise CheckpointError(f"{name} ({kind}) is {content['dtype']} on a rank and {record['dtype']} on another")
        content["fragments"].append([shard, record["start"], record["length"], record["file"], record["key"]])
    for tensor in tensors.values():
        for content in tensor["kinds"].values():
            content["fragments"].sort()
    described = {"version": VERSION, "tensors": dict(sorted(tensors.items()))}
    for parsed in parse_tensors(described).values():
        for kind in parsed.kinds:
            check_tiling(parsed, kind)
    return described


def open_tensors(folder: Path) -> LogicalTensors:
    """Read what tensors a checkpoint has; their files are opened when they are read.

    Raises:
        CheckpointError: there is no list of them, or it is damaged.
    """
    path = folder / TENSORS
    return LogicalTensors(folder, parse_tensors(read_json(path), path))


class LogicalTensors:
    """The logical tensors of a checkpoint, of which any part can be read. Files are mapped into memory, not loaded.

    Attributes:
        folder: the checkpoint.
        names: of the tensors, ascending.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.folder = folder
        self.names = tuple(sorted(tensors))
        self._tensors = tensors
        self._files: dict[str, Any] = {}
        self._checked: set[tuple[str, str]] = set()

    def kinds(self, name: str) -> tuple[str, ...]:
        """List the kinds of a tensor."""
        return tuple(self._tensor(name).kinds)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor."""
        return self._tensor(name).sharding.logical_shape

    def padding(self, name: str) -> int:
        """Count the entries at the end of the divided dimension that hold nothing: rows of unused vocabulary."""
        return self._tensor(name).sharding.padding

    def sharding(self, name: str) -> Sharding:
        """How the tensor was divided when it was saved; of its first shard."""
        return self._tensor(name).sharding

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """Dtype in which a kind of a tensor is kept."""
        self._require(name, kind)
        return self._tensor(name).kinds[kind].dtype

    def fragments(self, name: str, kind: str = WEIGHT) -> tuple[StoredFragment, ...]:
        """Say in which fragments a kind of a tensor lies."""
        self._require(name, kind)
        return self._tensor(name).kinds[kind].fragments

    def check(self) -> None:
        """Raise when any entry of any tensor is missing or written twice, as far as the list of fragments tells.

        Raises:
            CheckpointError: names the first of them.
        """
        for name in self.names:
            for kind in self.kinds(name):
                self._check(name, kind)

    def read(self, name: str, kind: str = WEIGHT, rows: range | None = None) -> Tensor:
        """Read a logical tensor, or the band `rows` of its first dimension; to be read only: it may lie in the file.

        Args:
            name: of the tensor.
            kind: of its kinds.
            rows: consecutive ones; all by default.

        Raises:
            CheckpointError: there is no such tensor or kind, entries are missing, or a file is damaged.
            ValueError: there are no such rows.
        """
        shape = self.shape(name)
        whole = normalized(replace(self.sharding(name), num_shards=1))
        if rows is None:
            return self.read_range(name, kind, whole, 0, math.prod(shape)).view(shape)
        if rows.step != 1 or not 0 <= rows.start <= rows.stop <= shape[0]:
            raise ValueError(f"{name} has {shape[0]} rows: {rows} are not some of them")
        size = math.prod(shape[1:])
        return self.read_range(name, kind, whole, rows.start * size, len(rows) * size).view(len(rows), *shape[1:])

    def read_range(self, name: str, kind: str, sharding: Sharding, start: int, length: int) -> Tensor:
        """Read the entries `[start, start + length)` of a shard, whichever layout wrote them.

        The padding may be another than it was: what there is more of it reads as zeros.

        Args:
            name: of the tensor.
            kind: of its kinds.
            sharding: the division, and the shard in it, in which the caller counts.
            start: the first entry.
            length: the number of entries.

        Returns:
            flat, `[length]`, on the host, in the dtype on disk. It is to be read only: where it is one range of one
            fragment it is a view of the file.

        Raises:
            CheckpointError: there is no such tensor or kind, it has another shape, entries are missing, or a file is
                damaged.
            ValueError: the shard has no such entries.
        """
        self._check(name, kind)
        tensor, wanted = self._tensor(name), normalized(sharding)
        if _unpadded(wanted) != _unpadded(tensor.sharding):
            raise CheckpointError(
                f"{name} has the shape {_in_words(tensor.sharding)} in {self.folder}, and {_in_words(wanted)} in this "
                "model"
            )
        if start < 0 or start + length > shard_numel(wanted):
            raise ValueError(f"{name}: a shard of {shard_numel(wanted)} entries has no {length} from {start} on")
        fragments = tensor.kinds[kind].fragments
        if _same_division(tensor.sharding, wanted):
            fragments = tuple(fragment for fragment in fragments if fragment.shard == wanted.rank)
            for fragment in fragments:
                if fragment.start <= start and start + length <= fragment.start + fragment.length:
                    return self._map(tensor, kind, fragment)[start - fragment.start :][:length]
        return self._gather(tensor, kind, fragments, wanted, start, length)

    def _gather(
        self,
        tensor: StoredTensor,
        kind: str,
        fragments: Sequence[StoredFragment],
        wanted: Sharding,
        start: int,
        length: int,
    ) -> Tensor:
        """Put a range together from what all fragments hold of it."""
        dim = _matrix_dim(tensor, wanted)
        mine = rectangles(wanted, dim, start, length)
        if wanted.logical_shape == tensor.sharding.logical_shape:
            flat = torch.empty(length, dtype=tensor.kinds[kind].dtype)
        else:
            mine = without_padding(mine, wanted, dim)
            flat = torch.zeros(length, dtype=tensor.kinds[kind].dtype)
        missing = sum(rectangle.numel for rectangle in mine)
        for fragment in fragments:
            theirs = rectangles(tensor.shard(fragment.shard), dim, fragment.start, fragment.length)
            for here, there in overlaps(mine, theirs):
                here.of(flat).copy_(there.of(self._map(tensor, kind, fragment)))
                missing -= here.numel
        if missing:
            raise CheckpointError(f"{tensor.name} ({kind}): {missing} of {length} entries are missing in {self.folder}")
        return flat

    def _map(self, tensor: StoredTensor, kind: str, fragment: StoredFragment) -> Tensor:
        """Map a fragment's entries into memory."""
        path = self.folder / fragment.file
        try:
            if fragment.file not in self._files:
                self._files[fragment.file] = safe_open(path, framework="pt")
            flat: Tensor = self._files[fragment.file].get_tensor(fragment.key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read for {tensor.name} ({kind}): {error}; the checkpoint is damaged, load another"
            ) from error
        if flat.shape != (fragment.length,) or flat.dtype != tensor.kinds[kind].dtype:
            raise CheckpointError(
                f"{path} holds {flat.dtype} of shape {tuple(flat.shape)} for {tensor.name} ({kind}) instead of "
                f"{fragment.length} entries: the checkpoint is damaged, load another"
            )
        return flat

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name}: it is of another model")
        return self._tensors[name]

    def _require(self, name: str, kind: str) -> None:
        if kind not in self._tensor(name).kinds:
            raise CheckpointError(
                f"{self.folder} holds no {kind} of {name}, only {', '.join(self.kinds(name))}: it was saved without "
                "that state or with another --optimizer"
            )

    def _check(self, name: str, kind: str) -> None:
        self._require(name, kind)
        if (name, kind) not in self._checked:
            try:
                check_tiling(self._tensor(name), kind)
            except CheckpointError as error:
                raise CheckpointError(f"{self.folder / TENSORS}: {error}") from error
            self._checked.add((name, kind))


def _same_division(stored: Sharding, wanted: Sharding) -> bool:
    """Whether flat ranges of the two mean the same entries."""
    if stored.logical_shape != wanted.logical_shape:
        return False
    if is_whole(stored) or is_whole(wanted):
        return is_whole(stored) and is_whole(wanted)
    return replace(stored, rank=0, padding=0) == replace(wanted, rank=0, padding=0)


def _unpadded(sharding: Sharding) -> tuple[int, ...]:
    """Shape of a tensor without the entries that hold nothing."""
    dim, shape = sharding.dim, sharding.logical_shape
    if dim is None:
        return shape
    return (*shape[:dim], shape[dim] - sharding.padding, *shape[dim + 1 :])


def _in_words(sharding: Sharding) -> str:
    """Say the shape of a tensor, and how much of it is padding."""
    return f"{sharding.logical_shape}" + (f" with {sharding.padding} of padding" if sharding.padding else "")


def _matrix_dim(tensor: StoredTensor, wanted: Sharding) -> int:
    """Return the dimension along which the one, the other or both are divided, or padded."""
    both = (tensor.sharding, wanted)
    dims = {sharding.dim for sharding in both if not is_whole(sharding) or sharding.padding} - {None}
    if len(dims) > 1:
        raise CheckpointError(
            f"{tensor.name} was saved divided along dimension {tensor.sharding.dim}, and this model divides it along "
            f"{wanted.dim}: load it on one tensor rank"
        )
    return next((dim for dim in dims if dim is not None), 0)


def _shares(fragments: Sequence[Fragment]) -> Iterator[list[Fragment]]:
    """Divide fragments over files: as many as there are threads to write them, more where these grew too large."""
    total = sum(_bytes(fragment) for fragment in fragments)
    target = min(LARGEST_FILE, max(SMALLEST_FILE, -(-total // WRITING_THREADS)))
    share: list[Fragment] = []
    filled = 0
    for fragment in fragments:
        if share and filled + _bytes(fragment) > target:
            yield _aligned(share)
            share, filled = [], 0
        share.append(fragment)
        filled += _bytes(fragment)
    if share:
        yield _aligned(share)


def _aligned(share: Sequence[Fragment]) -> list[Fragment]:
    """Put wide dtypes first, so that each tensor starts at a multiple of its entries' size."""
    return sorted(share, key=lambda fragment: -fragment.tensor.element_size())


def _bytes(fragment: Fragment) -> int:
    return fragment.tensor.numel() * fragment.tensor.element_size()


def fragment_key(fragment: Fragment) -> str:
    """Name of a fragment in its file."""
    return f"{fragment.kind}/{fragment.name}/{fragment.start}"


def fragment_record(fragment: Fragment, file: str) -> dict[str, Any]:
    """Say what a fragment in a file is, for `describe_tensors`.

    Raises:
        CheckpointError: it is no flat tensor or of a dtype that the files do not have.
    """
    tensor = fragment.tensor
    if tensor.dim() != 1 or tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{fragment.name} ({fragment.kind}) is {tensor.dtype} of shape {tuple(tensor.shape)}, and a checkpoint "
            f"holds flat ranges of {', '.join(DTYPES.values())}"
        )
    return {
        "file": file,
        "key": fragment_key(fragment),
        "name": fragment.name,
        "kind": fragment.kind,
        "start": fragment.start,
        "length": tensor.numel(),
        "dtype": DTYPES[tensor.dtype],
        "sharding": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(normalized(fragment.sharding)).items()
        },
    }
