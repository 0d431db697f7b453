"""How the part of a parameter that a rank holds relates to the logical tensor: the one that a single rank would hold.

Layers mark their parameters when they make them; initialisation, checkpoints and conversion read the marks. Marks are
attributes of the parameter, so they live as long as it does and survive `.to()`, casts and partitioning by an engine.

An entry of a logical tensor is on one tensor rank, or on all of them; never on some. Engines know no third kind: when
they add up a gradient norm, they count a divided parameter on every rank and any other on the first. A layer that uses
an entry on several ranks but not on all therefore owns it on one of them and exchanges what it computes from it (see
`QueryKeyValueLinear`), so that norms, optimizer states and checkpoints are those of one rank without further care.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from megatron.config.errors import ConfigError
from megatron.parallel.groups import Group

InitKind = Literal["normal", "scaled_normal", "zeros", "ones"]
"""How a parameter starts: normal(0, std), the same with std / sqrt(2 x layers), or a constant."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Which part of the logical tensor each rank of a group holds.

    Attributes:
        logical_shape: shape of the tensor on a group of one.
        dim: the dimension that is divided over the ranks; None when every rank holds the whole tensor.
        num_shards: number of ranks it is divided over.
        rank: which shard is this process's.
        blocks: relative sizes of blocks that lie one after the other along `dim`, each divided over the ranks for
            itself. The fused gate-and-up product has (1, 1): the logical tensor is [gate; up] and rank r holds
            [gate_r; up_r].
        groups: how often the blocks repeat along `dim`. Whole groups go to the ranks as far as there are enough; where
            there are more ranks than groups, the blocks of a group are divided over the ranks that share it. The fused
            query, key and value product has one group for each key/value head, of the blocks (its query heads, 2).
        padding: how many entries at the end of `dim` hold nothing: vocabulary rows that no token uses. They start as
            zeros, whatever the initialisation, and exports leave them out. Set also when there is but one shard.
    """

    logical_shape: tuple[int, ...]
    dim: int | None
    num_shards: int = 1
    rank: int = 0
    blocks: tuple[int, ...] = (1,)
    groups: int = 1
    padding: int = 0


def mark_sharded(
    param: nn.Parameter,
    dim: int,
    group: Group,
    logical_shape: Sequence[int],
    *,
    blocks: tuple[int, ...] = (1,),
    groups: int = 1,
    padding: int = 0,
) -> None:
    """Record that `param` is this rank's shard of a tensor of `logical_shape`, divided over `group` along `dim`.

    The arguments are fields of `Sharding`. A group of one is marked as well, so that names and logical shapes are
    known in every layout. Only a parameter that is really divided gets `tensor_model_parallel`: it is by that tag that
    engines count a parameter in the gradient norm on every rank of the tensor group, not on its first rank alone.
    """
    param.sharding = Sharding(  # type: ignore[attr-defined]
        logical_shape=tuple(logical_shape),
        dim=dim,
        num_shards=group.size,
        rank=group.rank,
        blocks=blocks,
        groups=groups,
        padding=padding,
    )
    if group.size > 1:
        param.tensor_model_parallel = True  # type: ignore[attr-defined]


def describe_sharding(module: nn.Module) -> dict[str, Sharding]:
    """Return the sharding of each parameter of `module` by name; an unmarked parameter is whole on every rank.

    Shared parameters occur once, under the name that `named_parameters` gives them. Call it before an engine
    partitions the parameters: an unmarked one tells its shape by its own.
    """
    return {name: sharding_of(param) for name, param in module.named_parameters()}


def sharding_of(param: nn.Parameter) -> Sharding:
    """Return the sharding that `mark_sharded` recorded; whole on every rank when there is none."""
    marked: Sharding | None = getattr(param, "sharding", None)
    return marked or Sharding(logical_shape=tuple(param.shape), dim=None)


def mark_init(param: nn.Parameter, kind: InitKind) -> None:
    """Record how the logical tensor of `param` starts.

    Layers leave their parameters empty: whoever knows all of them draws each logical tensor from the seed and its
    name, the same on every rank and in every layout, and keeps the rank's slice.

    Raises:
        ValueError: no such kind.
    """
    if kind not in get_args(InitKind):
        raise ValueError(f"initialisation {kind!r} is none of {', '.join(get_args(InitKind))}")
    param.init_kind = kind  # type: ignore[attr-defined]


def init_of(param: nn.Parameter) -> InitKind:
    """Return the kind that `mark_init` recorded.

    Raises:
        ValueError: the layer that made the parameter did not mark it.
    """
    kind: InitKind | None = getattr(param, "init_kind", None)
    if kind is None:
        raise ValueError(f"a parameter of shape {tuple(param.shape)} does not say how it starts: call mark_init on it")
    return kind


def slice_of(logical: Tensor, sharding: Sharding, rank: int | None = None) -> Tensor:
    """Return the shard of `rank` (this process's own by default) of a logical tensor; a view where it is one piece.

    Raises:
        ValueError: `logical` has not the logical shape.
    """
    if tuple(logical.shape) != sharding.logical_shape:
        raise ValueError(f"a tensor of shape {tuple(logical.shape)} cannot be sliced as {sharding}")
    if sharding.dim is None or sharding.num_shards == 1:
        return logical
    rank = sharding.rank if rank is None else rank
    parts = [logical.narrow(sharding.dim, start, length) for start, length in pieces_of(sharding, sharding.dim, rank)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=sharding.dim)


def join_shards(shards: Sequence[Tensor], sharding: Sharding) -> Tensor:
    """Return the logical tensor made of the shards of all ranks, in order of rank; the inverse of `slice_of`."""
    if sharding.dim is None or sharding.num_shards == 1:
        return shards[0]
    logical = shards[0].new_empty(sharding.logical_shape)
    for rank, shard in enumerate(shards):
        taken = 0
        for start, length in pieces_of(sharding, sharding.dim, rank):
            logical.narrow(sharding.dim, start, length).copy_(shard.narrow(sharding.dim, taken, length))
            taken += length
    return logical


def pieces_of(sharding: Sharding, dim: int, rank: int) -> Iterator[tuple[int, int]]:
    """Start and length along `dim` of each piece of the logical tensor that `rank` holds, in the order it holds them.

    Raises:
        ValueError: the ranks and the groups do not divide one another.
    """
    ranks, groups = sharding.num_shards, sharding.groups
    group_length = sharding.logical_shape[dim] // groups
    if groups % ranks == 0:
        length = groups // ranks * group_length
        yield rank * length, length  # whole groups, which are neighbours
        return
    if ranks % groups:
        raise ValueError(f"{groups} groups and {ranks} ranks do not divide one another: {sharding}")
    index, part = divmod(rank, ranks // groups)
    start = index * group_length
    for block in sharding.blocks:
        block_length = group_length * block // sum(sharding.blocks)
        length = block_length // (ranks // groups)
        yield start + part * length, length
        start += block_length


def divide(count: int, group: Group, what: str) -> int:
    """`count` things evenly over the ranks of `group`: how many each holds.

    Args:
        count: for instance the number of key/value groups.
        group: the tensor group.
        what: the flag or size that the user knows it by.

    Raises:
        ConfigError: the ranks do not divide `count`, for instance because there are more ranks.
    """
    if count % group.size:
        raise ConfigError(
            [
                f"{what} {count} cannot be divided over {group.size} tensor-parallel ranks: "
                f"make it a multiple of {group.size} or lower --tensor-model-parallel-size"
            ]
        )
    return count // group.size
