"""Launching the kernels: strides, shapes of tiles and the order of programs.

Legend: s queries, s' keys, b batch, n query heads, k key/value heads (n = k x group), d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron.kernels.attention.flash.backward import key_value_kernel, query_kernel
from megatron.kernels.attention.flash.forward import forward_kernel
from megatron.kernels.attention.flash.tuning import Kernel, Tile, find_tile

ALIGNMENT = 16  # bytes: of what the copy engine moves
CACHE_BYTES = 32 * 2**20
"""Keys and values of the heads that are worked on together: they stay in the L2 cache."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is computed, beyond the tensors.

    Attributes:
        scale: factor on the products of queries and keys.
        causal: whether queries see no later keys; aligned to the bottom right.
        window: how many keys a query sees, its own and those just before; 0: all.
        softcap: bound of the logits, 0: none.
        dropout: probability of dropping a weight.
    """

    scale: float
    causal: bool
    window: int
    softcap: float
    dropout: float

    def numbers(self) -> tuple[float, float, int, int]:
        """Give the kernels' numbers of these: scale, cap, window and the threshold of dropout."""
        scale = self.scale if self.softcap else self.scale * math.log2(math.e)
        return scale, self.softcap, self.window, round(self.dropout * 65536)


class Variant(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        queries: rows of a tile of queries.
        keys: rows of a tile of keys.
        group: query heads that share a key head.
        size: channels of a head.
        padded: the same as a power of two.
        causal: see `Options`.
        window: whether there is one.
        documents: whether there are bounds of documents.
        capped: whether logits are.
        dropout: whether weights are dropped.
        looks_back: whether the first tiles of a row may be seen in part.
        ends_early: whether the last ones may.
        tma: whether the copy engine loads tiles.
        of_keys: whether the gradient of keys is made.
        of_values: whether that of values is.
    """

    queries: int
    keys: int
    group: int
    size: int
    padded: int
    causal: bool
    window: bool
    documents: bool
    capped: bool
    dropout: bool
    looks_back: bool
    ends_early: bool
    tma: bool
    of_keys: bool
    of_values: bool


def make_variant(
    tile: Tile, group: int, size: int, options: Options, *, ragged: bool, by_key: bool, documents: bool
) -> Variant:
    """Choose the constants of a kernel.

    Args:
        tile: how it cuts its work.
        group: query heads that share a key head.
        size: channels of a head.
        options: what is computed.
        ragged: whether the last tile of a row is not full.
        by_key: whether rows of tiles belong to keys, of which the first queries see a part where there is causality.
        documents: whether there are bounds.
    """
    sees_part_of_first, sees_part_of_last = options.window > 0, options.causal
    if by_key:
        sees_part_of_first, sees_part_of_last = sees_part_of_last, sees_part_of_first
    return Variant(
        queries=tile.queries,
        keys=tile.keys,
        group=group,
        size=size,
        padded=padded_size(size),
        causal=options.causal,
        window=options.window > 0,
        documents=documents,
        capped=options.softcap > 0,
        dropout=options.dropout > 0,
        looks_back=sees_part_of_first or documents,
        ends_early=sees_part_of_last or documents or ragged,
        tma=tile.tma,
        of_keys=True,
        of_values=True,
    )


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    seeds: Tensor | None,
    options: Options,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the output, [s, b, n, d], and the base-2 logarithms of the softmax denominators, fp32 [b, n, s]."""
    length, batch, heads, _ = query.shape
    tile = tile or _tile("forward", query)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log_sums = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    forward_kernel[(triton.cdiv(length, tile.queries) * batch * heads,)](
        *_sources(tile, (query, tile.queries), (key, tile.keys), (value, tile.keys)),
        output,
        log_sums,
        bounds,
        seeds,
        _strides(query, key, value, output),
        (heads, length, key.shape[0]),
        (batch, _heads_together(key) * (heads // key.shape[2]), *options.numbers()),
        _variant(tile, query, key, options, bounds, by_key=False),
        **_resources(tile),
    )
    return output, log_sums


def launch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    bounds: Tensor | None,
    seeds: Tensor | None,
    options: Options,
    tiles: tuple[Tile | None, Tile | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value from that of the output."""
    grad_query, deltas = launch_query(
        grad, query, key, value, output, log_sums, bounds, seeds, options, tiles[0] or _tile("query", query)
    )
    grad_key, grad_value = launch_key_value(
        grad, query, key, value, log_sums, deltas, bounds, seeds, options, tiles[1] or _tile("key_value", query)
    )
    return grad_query, grad_key, grad_value


def launch_query(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    bounds: Tensor | None,
    seeds: Tensor | None,
    options: Options,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the query, and delta, fp32 [b, n, s]."""
    length, batch, heads, _ = query.shape
    grad_query = torch.empty_like(output)
    deltas = torch.empty_like(log_sums)
    query_kernel[(triton.cdiv(length, tile.queries) * batch * heads,)](
        *_sources(tile, (query, tile.queries), (key, tile.keys), (value, tile.keys), (grad, tile.queries)),
        output,
        log_sums,
        (grad_query, deltas),
        bounds,
        seeds,
        _strides(query, key, value, grad, output),
        (heads, length, key.shape[0]),
        (batch, _heads_together(key) * (heads // key.shape[2]), *options.numbers()),
        _variant(tile, query, key, options, bounds, by_key=False),
        **_resources(tile),
    )
    return grad_query, deltas


def launch_key_value(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    bounds: Tensor | None,
    seeds: Tensor | None,
    options: Options,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of key and value."""
    key_length, batch, groups, _ = key.shape
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    variant = _variant(tile, query, key, options, bounds, by_key=True)
    for of_keys, of_values in ((True, False), (False, True)) if tile.apart else ((True, True),):
        key_value_kernel[(triton.cdiv(key_length, tile.keys) * batch * groups,)](
            *_sources(tile, (query, tile.queries), (key, tile.keys), (value, tile.keys), (grad, tile.queries)),
            log_sums,
            deltas,
            (grad_key, grad_value),
            bounds,
            seeds,
            _strides(query, key, value, grad, grad_key),
            (groups, query.shape[0], key_length),
            (batch, _heads_together(query), *options.numbers()),
            variant._replace(of_keys=of_keys, of_values=of_values),
            **_resources(tile),
        )
    return grad_key, grad_value


def _tile(kernel: Kernel, query: Tensor) -> Tile:
    capability = torch.cuda.get_device_capability(query.device)[0] if query.device.type == "cuda" else 0
    return find_tile(kernel, padded_size(query.shape[-1]), capability)


def _strides(*tensors: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Give those of b, n and s of each tensor [s, b, n, d]."""
    return tuple((tensor.stride(1), tensor.stride(2), tensor.stride(0)) for tensor in tensors)


def _heads_together(tensor: Tensor) -> int:
    """Say how many heads of these lengths fit the L2 cache with two tensors each."""
    length, _, _, size = tensor.shape
    return max(1, CACHE_BYTES // (2 * length * size * tensor.element_size()))


def addressable(tensor: Tensor) -> Tensor:
    """Give a tensor [s, b, n, d] that the kernels and the copy engine can stride over: itself, in all usual cases."""
    size = tensor.element_size()
    strides = [stride for length, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if length > 1]
    if (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % ALIGNMENT == 0
        and all(stride > 0 and stride * size % ALIGNMENT == 0 for stride in strides)
    ):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _sources(tile: Tile, *tensors: tuple[Tensor, int]) -> list[Any]:
    """Describe tensors [s, b, n, d] to the copy engine, by tiles of so many rows, or leave them as they are."""
    if not tile.tma:
        return [tensor for tensor, _ in tensors]
    return [_descriptor(tensor, rows) for tensor, rows in tensors]


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    view = tensor.permute(1, 2, 0, 3)
    size = view.shape[-1]
    # The stride of a dimension of length 1 means nothing and may be anything, which the copy engine does not like.
    strides = [stride if length > 1 else size for length, stride in zip(view.shape[:3], view.stride()[:3], strict=True)]
    return TensorDescriptor(view, list(view.shape), [*strides, 1], [1, 1, rows, padded_size(size)])


def padded_size(size: int) -> int:
    """Return the channels of a tile for heads of `size`."""
    return max(16, 1 << (size - 1).bit_length())


def _variant(
    tile: Tile, query: Tensor, key: Tensor, options: Options, bounds: Tensor | None, *, by_key: bool
) -> Variant:
    moving, rows = (query, tile.queries) if by_key else (key, tile.keys)
    return make_variant(
        tile,
        query.shape[2] // key.shape[2],
        query.shape[-1],
        options,
        ragged=moving.shape[0] % rows != 0,
        by_key=by_key,
        documents=bounds is not None,
    )


def _resources(tile: Tile) -> dict[str, int]:
    limits = {} if tile.registers is None else {"maxnreg": tile.registers}
    return {"num_warps": tile.warps, "num_stages": tile.stages, **limits}
