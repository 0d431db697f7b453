"""What the kernels of attention share: tiles in memory, who sees whom, and the weights that dropout keeps.

Legend: M queries and N keys of a tile, D channels, padded to a power of two. Logits are in base 2: exp2 is one
instruction, exp is two.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1.0e30)  # of a logit nobody sees: finite, so that no difference of two is NaN
VARYING = ["batch_size", "bundle", "window", "threshold"]  # numbers that are not worth a compilation each
ROUNDS = tl.constexpr(7)  # of Philox: the fewest that pass the statistical tests (Salmon et al. 2011)


@triton.jit
def place_of(program, blocks, heads, bundle, REVERSED: tl.constexpr):
    """Find the block and the head of a program.

    Heads go in bundles whose keys and values fit the L2 cache; inside of one the longest rows of tiles start first, so
    that the short ones fill the gaps at the end.
    """
    first = program // (blocks * bundle) * bundle
    rest = program % (blocks * bundle)
    size = tl.minimum(bundle, heads - first)
    block = rest // size
    if REVERSED:
        block = blocks - 1 - block
    return block, first + rest % size


@triton.jit
def load_rows(
    source,
    batch,
    head,
    row,
    length,
    stride_b,
    stride_n,
    stride_s,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TMA: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Load the tile [ROWS, PADDED] that starts at `row` of one head; what lies outside is 0.

    Args:
        source: a tensor descriptor [b, n, s, d] with TMA, else a pointer to the same.
        CHECKED: whether the tile may end behind the last row.
    """
    if TMA:
        tile = source.load([batch, head, row, 0]).reshape([ROWS, PADDED])
    else:
        base = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n + tl.cast(row, tl.int64) * stride_s
        rows = tl.arange(0, ROWS)
        channels = tl.arange(0, PADDED)
        pointers = base + rows[:, None] * stride_s + channels[None, :]
        if CHECKED:
            inside = (row + rows < length)[:, None] & (channels < SIZE)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif SIZE < PADDED:
            tile = tl.load(pointers, mask=(channels < SIZE)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    target,
    tile,
    batch,
    head,
    row,
    length,
    stride_b,
    stride_n,
    stride_s,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Store a tile [ROWS, PADDED] at `row` of one head, but for what lies outside."""
    base = target + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n + tl.cast(row, tl.int64) * stride_s
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED)
    inside = (row + rows < length)[:, None] & (channels < SIZE)[None, :]
    tl.store(base + rows[:, None] * stride_s + channels[None, :], tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def keys_of(
    queries,
    batch,
    bounds,
    query_length,
    key_length,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Return the range of keys, first and end, that each of these queries sees; both grow with the query.

    Args:
        queries: indices, int32, a block or a number; those from `query_length` on count as the last.
        bounds: pointer to int32 [b, 2, s], where the document of each token begins and ends; read with DOCUMENTS.
    """
    queries = tl.minimum(queries, query_length - 1)
    first = queries * 0
    end = first + key_length
    if CAUSAL:
        end = queries + (key_length - query_length + 1)
    if WINDOW:
        first = tl.maximum(end - window, 0)
    if DOCUMENTS:
        row = bounds + batch.to(tl.int64) * (2 * query_length)
        first = tl.maximum(first, tl.load(row + queries))
        if not CAUSAL:
            end = tl.load(row + query_length + queries)
    return first, end


@triton.jit
def queries_of(
    keys,
    batch,
    bounds,
    query_length,
    key_length,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Return the range of queries, first and end, that see each of these keys: the inverse of `keys_of`."""
    keys = tl.minimum(keys, key_length - 1)
    first = keys * 0
    end = first + query_length
    if CAUSAL:
        first = tl.maximum(keys - (key_length - query_length), 0)
    if WINDOW:
        end = tl.minimum(keys - (key_length - query_length) + window, query_length)
    if DOCUMENTS:
        row = bounds + batch.to(tl.int64) * (2 * query_length)
        end = tl.minimum(end, tl.load(row + query_length + keys))
        if not CAUSAL:
            first = tl.load(row + keys)
    return first, end


@triton.jit
def capped(products, scale, cap):
    """Return tanh(products x scale / cap): the logits over their cap."""
    return 1 - 2 / (1 + tl.exp2(products * (scale / cap * 2.8853900817779268)))  # 2 log2(e)


@triton.jit
def kept(seed, head, query, key, threshold, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Tell which weights dropout keeps: bool [M, N], or [N, M] where transposed, a function of the place alone.

    Each call of Philox gives 8 x 16 bits. They go to the 8 weights at which bit 3 of the query and bits 0 and 3 of
    the key differ: one thread holds these together in the matrix units' layouts, so the compiler merges their calls.

    Args:
        seed: int64.
        head: index of the head, over all samples.
        query: index of the tile's first, a multiple of 16.
        key: likewise.
        threshold: of 65536; weights whose bits are below are dropped.
    """
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    if TRANSPOSED:
        rows, columns = rows[None, :], columns[:, None]
    else:
        rows, columns = rows[:, None], columns[None, :]
    row_place = (query >> 1) + ((rows & 7) | ((rows >> 4) << 3))
    column_place = (key >> 2) + (((columns >> 1) & 3) | ((columns >> 4) << 2))
    zero = row_place * 0 + column_place * 0
    word0, word1, word2, word3 = tl.philox(seed, zero + row_place, zero + column_place, zero + head, zero, ROUNDS)
    low_row, low_column = ((rows >> 3) & 1) == 0, ((columns >> 3) & 1) == 0
    word = tl.where(low_row, tl.where(low_column, word0, word1), tl.where(low_column, word2, word3))
    bits = tl.where((columns & 1) == 0, word & 0xFFFF, word >> 16)
    return bits.to(tl.int32) >= threshold
