"""What the files of an older checkpoint hold of each parameter, and how the tensor ranks' parts make a logical tensor.

Legend: n query heads, k key/value heads, g = n / k, d head size, all of one tensor rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron.checkpoint.errors import CheckpointError
from megatron.config.model import ModelConfig
from megatron.parallel.sharding import Sharding, join_shards

WEIGHT = "weight"
"""Kind of the parameter itself, as the forward pass had it."""

MASTER = "master"
"""Kind of its fp32 copy, which the optimizer kept beside a weight in half precision."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of Adam's means of the gradient and of its square."""

Replicas = Literal["equal", "first", "mean"]
"""What to take where tensor ranks hold different values of a parameter that they should share."""


@dataclass(frozen=True)
class Part:
    """What one tensor rank holds of a parameter, or of one of its moments.

    Attributes:
        file: where it is from, and `key` there: for messages.
        shape: of the rank's shard.
        pieces: its entries, row-major, one piece after the other; they stay in the file until `read`.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    pieces: tuple[Tensor, ...]

    def read(self) -> Tensor:
        """Return the shard, fp32.

        Raises:
            CheckpointError: the pieces are not as many entries as the shape has.
        """
        flat = torch.cat([piece.detach().reshape(-1).float() for piece in self.pieces]) if self.pieces else None
        held = 0 if flat is None else flat.numel()
        if flat is None or held != math.prod(self.shape):
            raise CheckpointError(
                f"{self.file}: {self.key} has {held} entries where its shape {self.shape} has "
                f"{math.prod(self.shape)}: files of several checkpoints are mixed, or some are missing"
            )
        return flat.view(self.shape)


@dataclass
class OlderCheckpoint:
    """What was found in a folder of one of the older systems.

    Attributes:
        file: the one that the arguments are from.
        arguments: the older system's flags, by their names.
        iteration: optimizer steps done.
        version: `checkpoint_version`, which tells the order of query, key and value.
        tensor_size: tensor ranks.
        parts: by place and kind, each tensor rank's part.
        optimizer_steps: Adam's count of steps; None when no state of the optimizer was found.
        notes: sentences for the user.
    """

    file: Path
    arguments: Mapping[str, Any]
    iteration: int
    version: float
    tensor_size: int
    parts: dict[str, dict[str, list[Part]]] = field(default_factory=dict)
    optimizer_steps: int | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, place: str, kind: str, part: Part) -> None:
        """Add the next tensor rank's part."""
        self.parts.setdefault(place, {}).setdefault(kind, []).append(part)

    def drop(self, kinds: Sequence[str]) -> None:
        """Forget kinds of all parameters."""
        for held in self.parts.values():
            for kind in kinds:
                held.pop(kind, None)


class Joiner:
    """Makes logical tensors of the parts.

    Args:
        config: of the model.
        vocab_size: ids in use: further rows of the vocabulary are padding, and become zeros.
        version: `checkpoint_version`.
        tensor_size: tensor ranks.
        replicas: what to do where ranks differ about what they share.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, version: float, tensor_size: int, replicas: Replicas = "equal"
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.version = version
        self.tensor_size = tensor_size
        self.replicas = replicas

    def join(self, place: str, parts: Sequence[Part], sharding: Sharding) -> Tensor:
        """Return the logical tensor, fp32, of `sharding.logical_shape`.

        Raises:
            CheckpointError: parts are missing, of another shape than the model's, or differ where they should not.
        """
        if len(parts) != self.tensor_size:
            raise CheckpointError(
                f"{parts[0].file}: {parts[0].key} is there for {len(parts)} tensor ranks of {self.tensor_size}: "
                "files are missing, copy all of the checkpoint"
            )
        if place in {"words", "head"}:
            return self._vocabulary(parts, sharding)
        if place == "positions":  # every rank had all of them, whoever may divide the table now
            sharding = replace(sharding, dim=None)
        sharding = replace(sharding, num_shards=1 if sharding.dim is None else self.tensor_size)
        _check_shapes(parts, sharding)
        if sharding.dim is None:
            return self._replicated(parts)
        shards = [part.read() for part in parts]
        if ".attention.qkv." in place:
            self._require_whole_heads(parts[0])
            shards = [grouped_by_head(shard, self.version, self.config.kv_channels) for shard in shards]
        return join_shards(shards, sharding)

    def _vocabulary(self, parts: Sequence[Part], sharding: Sharding) -> Tensor:
        """Put the ranks' rows together; their number was a multiple of the tensor ranks, here it is not."""
        logical = torch.zeros(sharding.logical_shape)
        first = 0
        for part in parts:
            shard = part.read()
            if shard.dim() != 2 or shard.shape[1] != logical.shape[1]:
                raise CheckpointError(
                    f"{part.file}: {part.key} has the shape {part.shape}, its rows should have "
                    f"{logical.shape[1]} entries"
                )
            end = min(first + len(shard), self.vocab_size)
            logical[first:end] = shard[: max(end - first, 0)]
            first += len(shard)
        if first < self.vocab_size:
            raise CheckpointError(
                f"{parts[0].file}: {parts[0].key} has {first} rows of all ranks, less than the vocabulary of "
                f"{self.vocab_size}: give the right --vocab-size"
            )
        return logical

    def _require_whole_heads(self, part: Part) -> None:
        heads = self.config.num_key_value_heads
        if heads % self.tensor_size:
            raise CheckpointError(
                f"{part.file}: {part.key} is of {heads} key/value heads on {self.tensor_size} tensor ranks, and how "
                "the older system shared a head among ranks is not known here: save it on fewer tensor ranks first"
            )

    def _replicated(self, parts: Sequence[Part]) -> Tensor:
        first = parts[0].read()
        if self.replicas == "first":
            return first
        total = first.double() if self.replicas == "mean" else first
        for part in parts[1:]:
            other = part.read()
            if self.replicas == "mean":
                total = total + other
            elif not torch.equal(first, other):
                largest = (first - other).abs().max().item()
                raise CheckpointError(
                    f"{part.file}: {part.key} differs by up to {largest:.3g} from that of tensor rank 0, though all "
                    "ranks should hold the same: the older system left these gradients unsummed under sequence "
                    "parallelism. No single model is what it trained; take --replicas mean, or first, and compare "
                    "the loss"
                )
        return (total / len(parts)).float() if self.replicas == "mean" else first


def grouped_by_head(shard: Tensor, version: float, head_size: int) -> Tensor:
    """Order a rank's rows of query, key and value as [its query heads, key, value] of each key/value group.

    | checkpoint_version | rows |
    |---|---|
    | 0 | [3, n, d] |
    | 1.0 | [n, d, 3] |
    | 2.0 and later | [k, g + 2, d]: as here |
    """
    if version >= 2.0:
        return shard
    heads = shard.shape[0] // (3 * head_size)
    rest = shard.shape[1:]
    if version >= 1.0:
        rows = shard.view(heads, head_size, 3, *rest).transpose(1, 2)
    else:
        rows = shard.view(3, heads, head_size, *rest).transpose(0, 1)
    return rows.reshape(shard.shape)


def _check_shapes(parts: Sequence[Part], sharding: Sharding) -> None:
    expected = list(sharding.logical_shape)
    if sharding.dim is not None:
        expected[sharding.dim] //= sharding.num_shards
    for part in parts:
        if list(part.shape) != expected:
            raise CheckpointError(
                f"{part.file}: {part.key} has the shape {tuple(part.shape)}, but the arguments in {part.file.name} "
                f"and the number of tensor ranks make it {tuple(expected)}"
            )
