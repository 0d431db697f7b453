"""Forward: one program a tile of queries, over the keys that it sees (Dao 2023, arXiv:2307.08691, algorithm 1).

For the legend see `tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.kernels.attention.flash.tiles import (
    FIRST,
    HIDDEN,
    INNER,
    kept,
    keys_of,
    load_rows,
    logits_of,
    parts_of_keys,
    place_of,
    store_rows,
    undropped,
)


@triton.jit(do_not_specialize=["numbers"])
def forward_kernel(query, key, value, output, log_sums, bounds, seeds, strides, sizes, numbers, variant: tl.constexpr):
    """Write output [s, b, n, d] and, for backward, the base-2 logarithm of each softmax's denominator, [b, n, s].

    Args:
        query: pointer, or a tensor descriptor [b, n, s, d]; key and value likewise.
        bounds: see `keys_of`.
        seeds: see `kept`.
        strides: of query, key, value and output, each of b, n and s.
        variant: its `ragged` tells whether the last tile of keys is not full.
    """
    heads, query_length, key_length = sizes
    M: tl.constexpr = variant.queries
    N: tl.constexpr = variant.keys
    D: tl.constexpr = variant.padded
    block, place = place_of(tl.cdiv(query_length, M), numbers[0] * heads, numbers[1], variant.causal)
    batch, head, row = place // heads, place % heads, block * M
    group = head // variant.group
    q = load_rows(query, strides[0], batch, head, row, query_length, M, True, variant)
    rows = row + tl.arange(0, M)
    firsts, ends = keys_of(rows, batch, bounds, sizes, numbers, variant)
    low, inner, outer, high = parts_of_keys(row, batch, bounds, sizes, numbers, variant)
    total = tl.zeros([M, D], dtype=tl.float32)
    top = tl.full([M], HIDDEN, dtype=tl.float32)
    denominator = tl.zeros([M], dtype=tl.float32)
    for part in tl.static_range(3):
        if part == INNER or (variant.looks_back if part == FIRST else variant.ends_early):
            start = low if part == FIRST else (inner if part == INNER else outer)
            stop = inner if part == FIRST else (outer if part == INNER else high)
            for column in tl.range(start, stop, N):
                column = tl.multiple_of(column, N)
                k = load_rows(key, strides[1], batch, group, column, key_length, N, part != INNER, variant)
                logits, factor = logits_of(q, k, numbers, variant)
                if part != INNER:
                    columns = column + tl.arange(0, N)[None, :]
                    seen = (columns >= firsts[:, None]) & (columns < ends[:, None])
                    logits = tl.where(seen, logits, HIDDEN)
                new_top = tl.maximum(top, tl.max(logits, axis=1) * factor)
                weights = tl.exp2(logits * factor - new_top[:, None])
                if part != INNER:
                    weights = tl.where(seen, weights, 0.0)
                fade = tl.exp2(top - new_top)
                denominator = denominator * fade + tl.sum(weights, axis=1)
                total, top = total * fade[:, None], new_top
                if variant.dropout:
                    weights = tl.where(kept(seeds, place, row, column, numbers, variant, False), weights, 0.0)
                v = load_rows(value, strides[2], batch, group, column, key_length, N, part != INNER, variant)
                total = tl.dot(weights.to(v.dtype), v, total, input_precision="ieee")
    total = total / denominator[:, None]
    if variant.dropout:
        total = total * undropped(numbers)
    store_rows(output, strides[3], total, batch, head, row, query_length, M, variant)
    line = place.to(tl.int64) * query_length
    tl.store(log_sums + line + rows, top + tl.log2(denominator), mask=rows < query_length)
