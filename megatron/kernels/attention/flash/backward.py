"""Backward: two kernels that each compute the weights again, so that no sum depends on the order of programs.

The first, a program a tile of queries, makes their gradient and delta; the second, a program a tile of keys, makes the
gradients of keys and values, over all query heads of the group (Dao 2023, arXiv:2307.08691, algorithm 2). Where heads
are so wide that a program cannot hold both, it runs twice, for one of them each.

With weights P = softmax(S), dropout D (0 or 1 / (1 - p)), output O = (D o P) V:
    dV = (D o P)^T dO,  dP = D o (dO V^T),  delta = rows of dO o O,  dS = P o (dP - delta),  dQ = dS K,  dK = dS^T Q.
For the legend see `tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.kernels.attention.flash.tiles import (
    FIRST,
    INNER,
    gradient_factor,
    kept,
    keys_of,
    load_rows,
    logits_of,
    parts_of_keys,
    parts_of_queries,
    place_of,
    queries_of,
    store_rows,
    undropped,
)


@triton.jit(do_not_specialize=["numbers"])
def query_kernel(
    query, key, value, grad, output, log_sums, results, bounds, seeds, strides, sizes, numbers, variant: tl.constexpr
):
    """Write the gradient of queries, and delta [b, n, s], the two results. See `forward_kernel`.

    Args:
        grad: of the output, as a source like the query.
        strides: of query, key, value, grad and output; the first result has those of the output.
    """
    heads, query_length, key_length = sizes
    M: tl.constexpr = variant.queries
    N: tl.constexpr = variant.keys
    D: tl.constexpr = variant.padded
    block, place = place_of(tl.cdiv(query_length, M), numbers[0] * heads, numbers[1], variant.causal)
    batch, head, row = place // heads, place % heads, block * M
    group = head // variant.group
    q = load_rows(query, strides[0], batch, head, row, query_length, M, True, variant)
    g = load_rows(grad, strides[3], batch, head, row, query_length, M, True, variant)
    rows = row + tl.arange(0, M)
    line = place.to(tl.int64) * query_length
    delta = delta_of(output, strides[4], g, batch, head, row, query_length, variant)
    tl.store(results[1] + line + rows, delta, mask=rows < query_length)
    log_sum = tl.load(log_sums + line + rows, mask=rows < query_length, other=0.0)
    firsts, ends = keys_of(rows, batch, bounds, sizes, numbers, variant)
    low, inner, outer, high = parts_of_keys(row, batch, bounds, sizes, numbers, variant)
    total = tl.zeros([M, D], dtype=tl.float32)
    for part in tl.static_range(3):
        if part == INNER or (variant.looks_back if part == FIRST else variant.ends_early):
            start = low if part == FIRST else (inner if part == INNER else outer)
            stop = inner if part == FIRST else (outer if part == INNER else high)
            for column in tl.range(start, stop, N):
                column = tl.multiple_of(column, N)
                k = load_rows(key, strides[1], batch, group, column, key_length, N, part != INNER, variant)
                v = load_rows(value, strides[2], batch, group, column, key_length, N, part != INNER, variant)
                logits, factor = logits_of(q, k, numbers, variant)
                grad_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
                weights = tl.exp2(logits * factor - log_sum[:, None])
                if part != INNER:
                    columns = column + tl.arange(0, N)[None, :]
                    seen = (columns >= firsts[:, None]) & (columns < ends[:, None])
                    weights = tl.where(seen, weights, 0.0)
                if variant.dropout:
                    keeps = kept(seeds, place, row, column, numbers, variant, False)
                    grad_weights = tl.where(keeps, grad_weights * undropped(numbers), 0.0)
                grad_logits = weights * (grad_weights - delta[:, None])
                if variant.capped:
                    grad_logits = grad_logits * (1 - logits * logits)
                total = tl.dot(grad_logits.to(k.dtype), k, total, input_precision="ieee")
    total = total * gradient_factor(numbers, variant)
    store_rows(results[0], strides[4], total, batch, head, row, query_length, M, variant)


@triton.jit
def delta_of(output, strides, g, batch, head, row, length, variant):
    """Sum the products of an output tile and its gradient over the channels: [M]. The output comes by pointer."""
    base = output + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + row.to(tl.int64) * strides[2]
    rows = tl.arange(0, variant.queries)
    channels = tl.arange(0, variant.padded)
    inside = (row + rows < length)[:, None] & (channels < variant.size)[None, :]
    made = tl.load(base + rows[:, None] * strides[2] + channels[None, :], mask=inside, other=0.0)
    return tl.sum(made.to(tl.float32) * g.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["numbers"])
def key_value_kernel(
    query, key, value, grad, log_sums, deltas, results, bounds, seeds, strides, sizes, numbers, variant: tl.constexpr
):
    """Write the gradients of keys and values, the two results. All is transposed: [keys, queries].

    Args:
        strides: of query, key, value, grad and of both results.
        sizes: the heads are those of the keys, and so is the bundle counted.
        variant: its `of_keys` and `of_values` tell which of the two are written.
    """
    groups, query_length, key_length = sizes
    M: tl.constexpr = variant.queries
    N: tl.constexpr = variant.keys
    D: tl.constexpr = variant.padded
    block, place = place_of(tl.cdiv(key_length, N), numbers[0] * groups, numbers[1], False)
    batch, group, column = place // groups, place % groups, block * N
    k = load_rows(key, strides[1], batch, group, column, key_length, N, True, variant)
    v = k
    if variant.of_keys:
        v = load_rows(value, strides[2], batch, group, column, key_length, N, True, variant)
    ranges = queries_of(column + tl.arange(0, N), batch, bounds, sizes, numbers, variant)
    low, inner, outer, high = parts_of_queries(column, batch, bounds, sizes, numbers, variant)
    totals = tl.zeros([N, D], dtype=tl.float32), tl.zeros([N, D], dtype=tl.float32)
    for part in tl.static_range(3):
        if part == INNER or (variant.looks_back if part == FIRST else variant.ends_early):
            start = low if part == FIRST else (inner if part == INNER else outer)
            stop = inner if part == FIRST else (outer if part == INNER else high)
            tiles = tl.cdiv(stop - start, M)
            for step in tl.range(0, tiles * variant.group):
                member, row = step // tiles, tl.multiple_of(start + step % tiles * M, M)
                if variant.group == 1:
                    member, row = 0, tl.multiple_of(start + step * M, M)
                head, query_place = group * variant.group + member, place * variant.group + member
                line = query_place.to(tl.int64) * query_length
                q = load_rows(query, strides[0], batch, head, row, query_length, M, part != INNER, variant)
                g = load_rows(grad, strides[3], batch, head, row, query_length, M, part != INNER, variant)
                log_sum = load_line(log_sums + line, row, query_length, M, part != INNER)
                delta = load_line(deltas + line, row, query_length, M, part != INNER)
                where = query_place, row, column
                totals = add_tile(
                    totals, k, v, q, g, log_sum, delta, ranges, where, seeds, numbers, part != INNER, variant
                )
    if variant.of_keys:
        total_key = totals[0] * gradient_factor(numbers, variant)
        store_rows(results[0], strides[4], total_key, batch, group, column, key_length, N, variant)
    if variant.of_values:
        store_rows(results[1], strides[4], totals[1], batch, group, column, key_length, N, variant)


@triton.jit
def add_tile(totals, k, v, q, g, log_sum, delta, ranges, where, seeds, numbers, CHECKED: tl.constexpr, variant):
    """Add a tile of queries to the gradients of keys and values: [N, D] each; returns them.

    Args:
        ranges: of queries that see each key, first and end.
        where: index of the query head over all samples, of the first query and of the first key.
        CHECKED: whether some of the queries do not see some of the keys.
    """
    total_key, total_value = totals
    place, row, column = where
    logits, factor = logits_of(k, q, numbers, variant)
    if variant.of_keys:
        grad_weights = tl.dot(v, tl.trans(g), input_precision="ieee")
    weights = tl.exp2(logits * factor - log_sum[None, :])
    if CHECKED:
        rows = row + tl.arange(0, variant.queries)[None, :]
        weights = tl.where((rows >= ranges[0][:, None]) & (rows < ranges[1][:, None]), weights, 0.0)
    kept_weights = weights
    if variant.dropout:
        keeps = kept(seeds, place, row, column, numbers, variant, True)
        kept_weights = tl.where(keeps, weights * undropped(numbers), 0.0)
    if variant.of_values:
        total_value = tl.dot(kept_weights.to(g.dtype), g, total_value, input_precision="ieee")
    if variant.of_keys:
        if variant.dropout:
            grad_weights = tl.where(keeps, grad_weights * undropped(numbers), 0.0)
        grad_logits = weights * (grad_weights - delta[None, :])
        if variant.capped:
            grad_logits = grad_logits * (1 - logits * logits)
        total_key = tl.dot(grad_logits.to(q.dtype), q, total_key, input_precision="ieee")
    return total_key, total_value


@triton.jit
def load_line(line, row, length, ROWS: tl.constexpr, CHECKED: tl.constexpr):
    """Load a number for each of the rows at `row`."""
    rows = row + tl.arange(0, ROWS)
    if CHECKED:
        numbers = tl.load(line + rows, mask=rows < length, other=0.0)
    else:
        numbers = tl.load(line + rows)
    return numbers
