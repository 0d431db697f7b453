"""Forward: one program a tile of queries, over the keys that it sees (Dao 2023, arXiv:2307.08691, algorithm 1).

Legend: M queries and N keys of a tile, D channels, padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.kernels.attention.flash.tiles import (
    HIDDEN,
    VARYING,
    capped,
    kept,
    keys_of,
    load_rows,
    place_of,
    store_rows,
)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    query,
    key,
    value,
    output,
    log_sums,
    bounds,
    seeds,
    query_b,
    query_n,
    query_s,
    key_b,
    key_n,
    key_s,
    value_b,
    value_n,
    value_s,
    output_b,
    output_n,
    output_s,
    batch_size,
    heads,
    query_length,
    key_length,
    bundle,
    scale,
    cap,
    window,
    threshold,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    CAPPED: tl.constexpr,
    DROPOUT: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write output [s, b, n, d] and, for backward, the base-2 logarithm of each softmax's denominator, [b, n, s].

    Args:
        query: pointer, or a tensor descriptor [b, n, s, d]; key and value likewise.
        bounds: see `keys_of`.
        seeds: pointer to the seed of dropout.
        bundle: see `place_of`.
        scale: of the logits, times log2(e) where they are not capped.
        threshold: see `kept`.
        GROUP: query heads that share a key head.
        RAGGED: whether the last tile of keys is not full.
    """
    block, place = place_of(tl.program_id(0), tl.cdiv(query_length, M), batch_size * heads, bundle, CAUSAL)
    batch, head = place // heads, place % heads
    row = block * M
    seed = tl.load(seeds) if DROPOUT else 0
    q = load_rows(query, batch, head, row, query_length, query_b, query_n, query_s, M, SIZE, PADDED, TMA, CHECKED=True)
    rows = row + tl.arange(0, M)
    firsts, ends = keys_of(rows, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS)
    low, all_end = keys_of(row, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS)
    all_low, high = keys_of(row + M - 1, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS)
    # Tiles of keys from `inner` to `outer` are seen whole by every query; those around them are seen in part.
    low = low // N * N
    inner = tl.minimum(tl.cdiv(all_low, N), tl.cdiv(high, N)) * N
    outer = tl.maximum(all_end // N * N, inner)

    total = tl.zeros([M, PADDED], dtype=tl.float32)
    top = tl.full([M], HIDDEN, dtype=tl.float32)
    denominator = tl.zeros([M], dtype=tl.float32)
    for part in tl.static_range(3):
        if part == 1 or (WINDOW or DOCUMENTS if part == 0 else CAUSAL or DOCUMENTS or RAGGED):
            start = low if part == 0 else (inner if part == 1 else outer)
            stop = inner if part == 0 else (outer if part == 1 else high)
            for column in tl.range(start, stop, N):
                column = tl.multiple_of(column, N)
                k = load_rows(
                    key, batch, head // GROUP, column, key_length, key_b, key_n, key_s, N, SIZE, PADDED, TMA, part != 1
                )
                logits = tl.dot(q, tl.trans(k), input_precision="ieee")
                factor = scale
                if CAPPED:
                    logits = capped(logits, scale, cap)
                    factor = cap * 1.4426950408889634
                if part != 1:
                    columns = column + tl.arange(0, N)[None, :]
                    seen = (columns >= firsts[:, None]) & (columns < ends[:, None])
                    logits = tl.where(seen, logits, HIDDEN)
                new_top = tl.maximum(top, tl.max(logits, axis=1) * factor)
                weights = tl.exp2(logits * factor - new_top[:, None])
                if part != 1:
                    weights = tl.where(seen, weights, 0.0)
                fade = tl.exp2(top - new_top)
                denominator = denominator * fade + tl.sum(weights, axis=1)
                total = total * fade[:, None]
                if DROPOUT:
                    weights = tl.where(kept(seed, place, row, column, threshold, M, N, False), weights, 0.0)
                v = load_rows(
                    value,
                    batch,
                    head // GROUP,
                    column,
                    key_length,
                    value_b,
                    value_n,
                    value_s,
                    N,
                    SIZE,
                    PADDED,
                    TMA,
                    part != 1,
                )
                total = tl.dot(weights.to(v.dtype), v, total, input_precision="ieee")
                top = new_top

    total = total / denominator[:, None]
    if DROPOUT:
        total = total * (65536.0 / (65536 - threshold))
    store_rows(output, total, batch, head, row, query_length, output_b, output_n, output_s, M, SIZE, PADDED)
    log_sum = top + tl.log2(denominator)
    tl.store(log_sums + place.to(tl.int64) * query_length + rows, log_sum, mask=rows < query_length)
