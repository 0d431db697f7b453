"""Launching the kernels: strides, shapes of tiles and the order of programs.

Legend: s queries, s' keys, b batch, n query heads, k key/value heads (n = k x group), d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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

    def numbers(self) -> dict[str, float | int]:
        """Give the kernels' arguments of these."""
        return {
            "scale": self.scale if self.softcap else self.scale * math.log2(math.e),
            "cap": self.softcap,
            "window": self.window,
            "threshold": round(self.dropout * 65536),
        }

    def switches(self) -> dict[str, bool]:
        """Give the kernels' constants of these."""
        return {
            "CAUSAL": self.causal,
            "WINDOW": self.window > 0,
            "CAPPED": self.softcap > 0,
            "DROPOUT": self.dropout > 0,
        }


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
        *(stride for tensor in (query, key, value, output) for stride in _strides(tensor)),
        bundle=_heads_together(key) * (heads // key.shape[2]),
        heads=heads,
        **_shapes(query, key, key.shape[0] % tile.keys != 0, bounds),
        **_constants(options, tile),
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
        deltas,
        grad_query,
        bounds,
        seeds,
        *(stride for tensor in (query, key, value, grad, output) for stride in _strides(tensor)),
        bundle=_heads_together(key) * (heads // key.shape[2]),
        heads=heads,
        **_shapes(query, key, key.shape[0] % tile.keys != 0, bounds),
        **_constants(options, tile),
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
    key_value_kernel[(triton.cdiv(key_length, tile.keys) * batch * groups,)](
        *_sources(tile, (query, tile.queries), (key, tile.keys), (value, tile.keys), (grad, tile.queries)),
        log_sums,
        deltas,
        grad_key,
        grad_value,
        bounds,
        seeds,
        *(stride for tensor in (query, key, value, grad, grad_key) for stride in _strides(tensor)),
        bundle=_heads_together(query),
        groups=groups,
        **_shapes(query, key, query.shape[0] % tile.queries != 0, bounds),
        **_constants(options, tile),
    )
    return grad_key, grad_value


def _tile(kernel: Kernel, query: Tensor) -> Tile:
    capability = torch.cuda.get_device_capability(query.device)[0] if query.device.type == "cuda" else 0
    return find_tile(kernel, _padded(query.shape[-1]), capability)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    stride_s, stride_b, stride_n, _ = tensor.stride()
    return stride_b, stride_n, stride_s


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
    return TensorDescriptor(view, list(view.shape), [*strides, 1], [1, 1, rows, _padded(size)])


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _shapes(query: Tensor, key: Tensor, ragged: bool, bounds: Tensor | None) -> dict[str, Any]:
    size = query.shape[-1]
    return {
        "batch_size": query.shape[1],
        "query_length": query.shape[0],
        "key_length": key.shape[0],
        "GROUP": query.shape[2] // key.shape[2],
        "SIZE": size,
        "PADDED": _padded(size),
        "DOCUMENTS": bounds is not None,
        "RAGGED": ragged,
    }


def _constants(options: Options, tile: Tile) -> dict[str, Any]:
    return {
        **options.numbers(),
        **options.switches(),
        "M": tile.queries,
        "N": tile.keys,
        "TMA": tile.tma,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **({"maxnreg": tile.registers} if tile.registers else {}),
    }
