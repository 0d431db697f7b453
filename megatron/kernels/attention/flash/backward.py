"""Backward: two kernels that each compute the weights again, so that no sum depends on the order of programs.

The first, a program a tile of queries, makes their gradient and delta; the second, a program a tile of keys, makes the
gradients of keys and values, over all query heads of the group (Dao 2023, arXiv:2307.08691, algorithm 2).

With weights P = softmax(S), dropout D (0 or 1 / (1 - p)), output O = (D o P) V:
    dV = (D o P)^T dO,  dP = D o (dO V^T),  delta = rows of dO o O,  dS = P o (dP - delta),  dQ = dS K,  dK = dS^T Q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.kernels.attention.flash.tiles import (
    VARYING,
    capped,
    kept,
    keys_of,
    load_rows,
    place_of,
    queries_of,
    store_rows,
)


@triton.jit(do_not_specialize=VARYING)
def query_kernel(
    query,
    key,
    value,
    grad_output,
    output,
    log_sums,
    deltas,
    grad_query,
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
    grad_b,
    grad_n,
    grad_s,
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
    """Write the gradient of queries, with the strides of `output`, and delta [b, n, s]. See `forward_kernel`."""
    block, place = place_of(tl.program_id(0), tl.cdiv(query_length, M), batch_size * heads, bundle, CAUSAL)
    batch, head = place // heads, place % heads
    row = block * M
    seed = tl.load(seeds) if DROPOUT else 0
    rows = row + tl.arange(0, M)
    q = load_rows(query, batch, head, row, query_length, query_b, query_n, query_s, M, SIZE, PADDED, TMA, CHECKED=True)
    grad = load_rows(
        grad_output, batch, head, row, query_length, grad_b, grad_n, grad_s, M, SIZE, PADDED, TMA, CHECKED=True
    )
    made = load_rows(
        output, batch, head, row, query_length, output_b, output_n, output_s, M, SIZE, PADDED, False, CHECKED=True
    )
    line = place.to(tl.int64) * query_length
    delta = tl.sum(made.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(deltas + line + rows, delta, mask=rows < query_length)
    log_sum = tl.load(log_sums + line + rows, mask=rows < query_length, other=0.0)

    firsts, ends = keys_of(rows, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS)
    low, all_end = keys_of(row, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS)
    all_low, high = keys_of(row + M - 1, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS)
    low = low // N * N
    inner = tl.minimum(tl.cdiv(all_low, N), tl.cdiv(high, N)) * N
    outer = tl.maximum(all_end // N * N, inner)

    total = tl.zeros([M, PADDED], dtype=tl.float32)
    for part in tl.static_range(3):
        if part == 1 or (WINDOW or DOCUMENTS if part == 0 else CAUSAL or DOCUMENTS or RAGGED):
            start = low if part == 0 else (inner if part == 1 else outer)
            stop = inner if part == 0 else (outer if part == 1 else high)
            for column in tl.range(start, stop, N):
                column = tl.multiple_of(column, N)
                k = load_rows(
                    key, batch, head // GROUP, column, key_length, key_b, key_n, key_s, N, SIZE, PADDED, TMA, part != 1
                )
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
                logits = tl.dot(q, tl.trans(k), input_precision="ieee")
                grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
                factor = scale
                if CAPPED:
                    logits = capped(logits, scale, cap)
                    factor = cap * 1.4426950408889634
                weights = tl.exp2(logits * factor - log_sum[:, None])
                if part != 1:
                    columns = column + tl.arange(0, N)[None, :]
                    seen = (columns >= firsts[:, None]) & (columns < ends[:, None])
                    weights = tl.where(seen, weights, 0.0)
                if DROPOUT:
                    keeps = kept(seed, place, row, column, threshold, M, N, False)
                    grad_weights = tl.where(keeps, grad_weights * (65536.0 / (65536 - threshold)), 0.0)
                grad_logits = weights * (grad_weights - delta[:, None])
                if CAPPED:
                    grad_logits = grad_logits * (1 - logits * logits)
                total = tl.dot(grad_logits.to(k.dtype), k, total, input_precision="ieee")

    total = total * (scale if CAPPED else scale * 0.6931471805599453)
    store_rows(grad_query, total, batch, head, row, query_length, output_b, output_n, output_s, M, SIZE, PADDED)


@triton.jit(do_not_specialize=VARYING)
def key_value_kernel(
    query,
    key,
    value,
    grad_output,
    log_sums,
    deltas,
    grad_key,
    grad_value,
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
    grad_b,
    grad_n,
    grad_s,
    output_b,
    output_n,
    output_s,
    batch_size,
    groups,
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
    """Write the gradients of keys and values, which share the strides `output_*`. All is transposed: [keys, queries].

    See `forward_kernel`; `groups` are the key heads, and so is `bundle` counted; RAGGED is the last tile of queries.
    """
    block, place = place_of(tl.program_id(0), tl.cdiv(key_length, N), batch_size * groups, bundle, False)
    batch, group = place // groups, place % groups
    column = block * N
    seed = tl.load(seeds) if DROPOUT else 0
    columns = column + tl.arange(0, N)
    k = load_rows(key, batch, group, column, key_length, key_b, key_n, key_s, N, SIZE, PADDED, TMA, CHECKED=True)
    v = load_rows(
        value, batch, group, column, key_length, value_b, value_n, value_s, N, SIZE, PADDED, TMA, CHECKED=True
    )
    firsts, ends = queries_of(columns, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS)
    low, all_end = queries_of(column, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS)
    all_low, high = queries_of(
        column + N - 1, batch, bounds, query_length, key_length, window, CAUSAL, WINDOW, DOCUMENTS
    )
    low = low // M * M
    inner = tl.minimum(tl.cdiv(all_low, M), tl.cdiv(high, M)) * M
    outer = tl.maximum(all_end // M * M, inner)

    total_key = tl.zeros([N, PADDED], dtype=tl.float32)
    total_value = tl.zeros([N, PADDED], dtype=tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        line = (place.to(tl.int64) * GROUP + member) * query_length
        for part in tl.static_range(3):
            if part == 1 or (CAUSAL or DOCUMENTS if part == 0 else WINDOW or DOCUMENTS or RAGGED):
                start = low if part == 0 else (inner if part == 1 else outer)
                stop = inner if part == 0 else (outer if part == 1 else high)
                for row in tl.range(start, stop, M):
                    row = tl.multiple_of(row, M)
                    rows = row + tl.arange(0, M)
                    q = load_rows(
                        query,
                        batch,
                        head,
                        row,
                        query_length,
                        query_b,
                        query_n,
                        query_s,
                        M,
                        SIZE,
                        PADDED,
                        TMA,
                        part != 1,
                    )
                    grad = load_rows(
                        grad_output,
                        batch,
                        head,
                        row,
                        query_length,
                        grad_b,
                        grad_n,
                        grad_s,
                        M,
                        SIZE,
                        PADDED,
                        TMA,
                        part != 1,
                    )
                    if part == 1:
                        log_sum, delta = tl.load(log_sums + line + rows), tl.load(deltas + line + rows)
                    else:
                        log_sum = tl.load(log_sums + line + rows, mask=rows < query_length, other=0.0)
                        delta = tl.load(deltas + line + rows, mask=rows < query_length, other=0.0)
                    logits = tl.dot(k, tl.trans(q), input_precision="ieee")
                    grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
                    factor = scale
                    if CAPPED:
                        logits = capped(logits, scale, cap)
                        factor = cap * 1.4426950408889634
                    weights = tl.exp2(logits * factor - log_sum[None, :])
                    if part != 1:
                        seen = (rows[None, :] >= firsts[:, None]) & (rows[None, :] < ends[:, None])
                        weights = tl.where(seen, weights, 0.0)
                    kept_weights = weights
                    if DROPOUT:
                        keeps = kept(seed, place * GROUP + member, row, column, threshold, M, N, True)
                        undropped = 65536.0 / (65536 - threshold)
                        kept_weights = tl.where(keeps, weights * undropped, 0.0)
                        grad_weights = tl.where(keeps, grad_weights * undropped, 0.0)
                    total_value = tl.dot(kept_weights.to(grad.dtype), grad, total_value, input_precision="ieee")
                    grad_logits = weights * (grad_weights - delta[None, :])
                    if CAPPED:
                        grad_logits = grad_logits * (1 - logits * logits)
                    total_key = tl.dot(grad_logits.to(q.dtype), q, total_key, input_precision="ieee")

    total_key = total_key * (scale if CAPPED else scale * 0.6931471805599453)
    store_rows(grad_key, total_key, batch, group, column, key_length, output_b, output_n, output_s, N, SIZE, PADDED)
    store_rows(grad_value, total_value, batch, group, column, key_length, output_b, output_n, output_s, N, SIZE, PADDED)
