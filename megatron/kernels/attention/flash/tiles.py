"""What the kernels of attention share: tiles in memory, who sees whom, and the weights that dropout keeps.

Legend: M queries and N keys of a tile, D channels, padded to a power of two. Logits are in base 2: exp2 is one
instruction, exp is two. `sizes` are (heads, queries, keys) of the problem; `numbers` are (samples, bundle, scale, cap,
window, threshold), see `Options`; `variant` is a `Variant`.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1.0e30)  # of a logit nobody sees: finite, so that no difference of two is NaN
ROUNDS = tl.constexpr(7)  # of Philox: the fewest that pass the statistical tests (Salmon et al. 2011)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FIRST, INNER, LAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # parts of a row of tiles


@triton.jit
def place_of(blocks, heads, bundle, REVERSED: tl.constexpr):
    """Find the block and the head of this program.

    Heads go in bundles whose keys and values fit the L2 cache; inside of one the longest rows of tiles start first, so
    that the short ones fill the gaps at the end.
    """
    program = tl.program_id(0)
    first = program // (blocks * bundle) * bundle
    rest = program % (blocks * bundle)
    size = tl.minimum(bundle, heads - first)
    block = rest // size
    if REVERSED:
        block = blocks - 1 - block
    return block, first + rest % size


@triton.jit
def load_rows(source, strides, batch, head, row, length, ROWS: tl.constexpr, CHECKED: tl.constexpr, variant):
    """Load the tile [ROWS, D] that starts at `row` of one head; what lies outside is 0.

    Args:
        source: a tensor descriptor [b, n, s, d] where the copy engine loads, else a pointer to the same.
        strides: of b, n and s.
        CHECKED: whether the tile may end behind the last row.
    """
    if variant.tma:
        tile = source.load([batch, head, row, 0]).reshape([ROWS, variant.padded])
    else:
        base = source + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
        base += tl.cast(row, tl.int64) * strides[2]
        rows = tl.arange(0, ROWS)
        channels = tl.arange(0, variant.padded)
        pointers = base + rows[:, None] * strides[2] + channels[None, :]
        if CHECKED:
            inside = (row + rows < length)[:, None] & (channels < variant.size)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif variant.size < variant.padded:
            tile = tl.load(pointers, mask=(channels < variant.size)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(target, strides, tile, batch, head, row, length, ROWS: tl.constexpr, variant):
    """Store a tile [ROWS, D] at `row` of one head, but for what lies outside."""
    base = target + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    base += tl.cast(row, tl.int64) * strides[2]
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, variant.padded)
    inside = (row + rows < length)[:, None] & (channels < variant.size)[None, :]
    tl.store(base + rows[:, None] * strides[2] + channels[None, :], tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def keys_of(queries, batch, bounds, sizes, numbers, variant):
    """Return the range of keys, first and end, that each of these queries sees; both grow with the query.

    Args:
        queries: indices, int32, a block or a number; those behind the last count as the last.
        bounds: pointer to int32 [b, 2, s], where the document of each token begins and ends.
    """
    query_length, key_length = sizes[1], sizes[2]
    queries = tl.minimum(queries, query_length - 1)
    first = queries * 0
    end = first + key_length
    if variant.causal:
        end = queries + (key_length - query_length + 1)
    if variant.window:
        first = tl.maximum(end - numbers[4], 0)
    if variant.documents:
        line = bounds + batch.to(tl.int64) * (2 * query_length)
        first = tl.maximum(first, tl.load(line + queries))
        if not variant.causal:
            end = tl.load(line + query_length + queries)
    return first, end


@triton.jit
def queries_of(keys, batch, bounds, sizes, numbers, variant):
    """Return the range of queries, first and end, that see each of these keys: the inverse of `keys_of`."""
    query_length, key_length = sizes[1], sizes[2]
    keys = tl.minimum(keys, key_length - 1)
    first = keys * 0
    end = first + query_length
    if variant.causal:
        first = tl.maximum(keys - (key_length - query_length), 0)
    if variant.window:
        end = tl.minimum(keys - (key_length - query_length) + numbers[4], query_length)
    if variant.documents:
        line = bounds + batch.to(tl.int64) * (2 * query_length)
        end = tl.minimum(end, tl.load(line + query_length + keys))
        if not variant.causal:
            first = tl.load(line + keys)
    return first, end


@triton.jit
def parts_of(first_of_first, end_of_first, first_of_last, end_of_last, TILE: tl.constexpr):
    """Cut the tiles that a row of tiles sees into three parts, given the ranges of its first and its last index.

    Returns:
        Where the parts begin, and the end of the last one: tiles of the inner part are seen whole by every index.
    """
    low = first_of_first // TILE * TILE
    inner = tl.minimum(tl.cdiv(first_of_last, TILE), tl.cdiv(end_of_last, TILE)) * TILE
    outer = tl.maximum(end_of_first // TILE * TILE, inner)
    return low, inner, outer, end_of_last


@triton.jit
def parts_of_keys(row, batch, bounds, sizes, numbers, variant):
    """Give `parts_of` the keys that the tile of queries at `row` sees."""
    first, last = row, row + variant.queries - 1
    low, all_end = keys_of(first, batch, bounds, sizes, numbers, variant)
    all_low, high = keys_of(last, batch, bounds, sizes, numbers, variant)
    return parts_of(low, all_end, all_low, high, variant.keys)


@triton.jit
def parts_of_queries(column, batch, bounds, sizes, numbers, variant):
    """Give `parts_of` the queries that see the tile of keys at `column`."""
    first, last = column, column + variant.keys - 1
    low, all_end = queries_of(first, batch, bounds, sizes, numbers, variant)
    all_low, high = queries_of(last, batch, bounds, sizes, numbers, variant)
    return parts_of(low, all_end, all_low, high, variant.queries)


@triton.jit
def logits_of(left, right, numbers, variant):
    """Multiply two tiles of heads; returns the products, or the logits over their cap, and their factor in base 2."""
    products = tl.dot(left, tl.trans(right), input_precision="ieee")
    factor = numbers[2]
    if variant.capped:  # tanh(x) = 1 - 2 / (1 + exp(2 x))
        products = 1 - 2 / (1 + tl.exp2(products * (numbers[2] / numbers[3] * 2 * LOG2_E)))
        factor = numbers[3] * LOG2_E
    return products, factor


@triton.jit
def gradient_factor(numbers, variant):
    """Return the derivative of a product's logit by the product, but for that of the cap."""
    return numbers[2] if variant.capped else numbers[2] * LN_2


@triton.jit
def kept(seeds, place, query, key, numbers, variant, TRANSPOSED: tl.constexpr):
    """Tell which weights dropout keeps: bool [M, N], or [N, M] where transposed, a function of the place alone.

    Each call of Philox gives 8 x 16 bits. They go to the 8 weights at which bit 3 of the query and bits 0 and 3 of
    the key differ: one thread holds these together in the matrix units' layouts, so the compiler merges their calls.

    Args:
        seeds: pointer to the seed, int64.
        place: index of the head, over all samples.
        query: index of the tile's first, a multiple of 16.
        key: likewise.
    """
    rows, columns = tl.arange(0, variant.queries), tl.arange(0, variant.keys)
    if TRANSPOSED:
        rows, columns = rows[None, :], columns[:, None]
    else:
        rows, columns = rows[:, None], columns[None, :]
    row_place = (query >> 1) + ((rows & 7) | ((rows >> 4) << 3))
    column_place = (key >> 2) + (((columns >> 1) & 3) | ((columns >> 4) << 2))
    zero = row_place * 0 + column_place * 0
    seed = tl.load(seeds)
    word0, word1, word2, word3 = tl.philox(seed, zero + row_place, zero + column_place, zero + place, zero, ROUNDS)
    low_row, low_column = ((rows >> 3) & 1) == 0, ((columns >> 3) & 1) == 0
    word = tl.where(low_row, tl.where(low_column, word0, word1), tl.where(low_column, word2, word3))
    bits = tl.where((columns & 1) == 0, word & 0xFFFF, word >> 16)
    return bits.to(tl.int32) >= numbers[5]


@triton.jit
def undropped(numbers):
    """Return what dropout multiplies the weights with that it keeps."""
    return 65536.0 / (65536 - numbers[5])
