"""Rotation of query and key channels by position (Su et al. 2021, "RoFormer"): in plain torch, and fused.

Legend: s sequence, b batch, n heads, d head size, r <= d rotated channels (the first ones), p rows of the tables; k
key/value heads, g = n / k query heads of each.

| plain torch                           | fused          |
|---------------------------------------|----------------|
| `apply_rotary`                        | `fused_rotary` |
| `split_rotary`                        | `fused_split`  |
| `split_heads`                         | `fused_heads`  |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.kernels.build import load_kernel
from megatron.kernels.operator import (
    DTYPE_CODES,
    Operator,
    address,
    falls_back,
    goes_straight,
    place,
    why_not_computed,
)


def apply_rotary(
    x_sbnd: Tensor,
    cos_pr: Tensor,
    sin_pr: Tensor,
    *,
    interleaved: bool = False,
    position_ids_bs: Tensor | None = None,
) -> Tensor:
    """Rotate the channel pairs (i, i + r/2), or (2i, 2i + 1) when interleaved, by the angle of each position.

    Args:
        x_sbnd: heads, [s, b, n, d].
        cos_pr: cosine of the angle of each position and pair, fp32 [p, r/2]; the arithmetic is fp32 as well.
        sin_pr: sine, likewise.
        interleaved: which channels are a pair.
        position_ids_bs: row of the tables for each token, [b, s]; None: row i for sequence index i.

    Returns:
        [s, b, n, d] in x's dtype.
    """
    rotated_size = 2 * cos_pr.shape[-1]
    if rotated_size < x_sbnd.shape[-1]:
        rotated, rest = x_sbnd.split([rotated_size, x_sbnd.shape[-1] - rotated_size], dim=-1)
        rotated = apply_rotary(rotated, cos_pr, sin_pr, interleaved=interleaved, position_ids_bs=position_ids_bs)
        return torch.cat((rotated, rest), dim=-1)
    if position_ids_bs is None:
        cos, sin = (table[: x_sbnd.shape[0], None, None, :] for table in (cos_pr, sin_pr))
    else:
        cos, sin = (table[position_ids_bs.t()].unsqueeze(2) for table in (cos_pr, sin_pr))
    first, second = x_sbnd.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x_sbnd.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return rotated.to(x_sbnd.dtype)


def split_heads(product_sbc: Tensor, groups: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a product [s, b, k (g + 2) d] whose groups are [query heads; key; value] each.

    Returns:
        query [s, b, n, d], key and value [s, b, k, d], as views.
    """
    heads = product_sbc.unflatten(-1, (groups, -1, head_size))
    query, key, value = heads.split([heads.shape[3] - 2, 1, 1], dim=3)
    return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)


def split_rotary(
    product_sbc: Tensor,
    cos_pr: Tensor,
    sin_pr: Tensor,
    *,
    groups: int,
    head_size: int,
    interleaved: bool = False,
    position_ids_bs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the product of queries, keys and values as `split_heads` does and rotate the first two."""
    query, key, value = split_heads(product_sbc, groups, head_size)
    query, key = (
        apply_rotary(x, cos_pr, sin_pr, interleaved=interleaved, position_ids_bs=position_ids_bs) for x in (query, key)
    )
    return query, key, value


def fused_rotary(
    x_sbnd: Tensor,
    cos_pr: Tensor,
    sin_pr: Tensor,
    *,
    interleaved: bool = False,
    position_ids_bs: Tensor | None = None,
) -> Tensor:
    """Compute `apply_rotary` in one pass, whatever the strides of the heads; backward is the inverse rotation."""
    if falls_back("rotary embedding", _why_not(x_sbnd, cos_pr)):
        return apply_rotary(x_sbnd, cos_pr, sin_pr, interleaved=interleaved, position_ids_bs=position_ids_bs)
    rotated: Tensor = _rotate(x_sbnd, cos_pr, sin_pr, position_ids_bs, interleaved, False)
    return rotated


def fused_split(
    product_sbc: Tensor,
    cos_pr: Tensor,
    sin_pr: Tensor,
    *,
    groups: int,
    head_size: int,
    interleaved: bool = False,
    position_ids_bs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `split_rotary` in one pass.

    The results are contiguous and nothing holds on to the product. Backward rotates the three gradients back into one
    tensor, in one pass as well.
    """
    if falls_back("rotary embedding", _why_not(product_sbc, cos_pr)):
        return split_rotary(
            product_sbc,
            cos_pr,
            sin_pr,
            groups=groups,
            head_size=head_size,
            interleaved=interleaved,
            position_ids_bs=position_ids_bs,
        )
    parts: tuple[Tensor, Tensor, Tensor] = _split(
        product_sbc, cos_pr, sin_pr, position_ids_bs, groups, head_size, interleaved
    )
    return parts


def fused_heads(product_sbc: Tensor, groups: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `split_heads`; backward puts the three gradients together in one pass."""
    # The kernel moves two channels at a time: of an odd size it would leave out the last.
    computed = head_size % 2 == 0 and why_not_computed(product_sbc.dtype) is None
    if computed and goes_straight(product_sbc) and torch.is_grad_enabled():
        parts: tuple[Tensor, Tensor, Tensor] = _Heads.apply(product_sbc, groups, head_size)
        return parts
    return split_heads(product_sbc, groups, head_size)


def _why_not(x: Tensor, table: Tensor) -> str | None:
    if table.dtype != torch.float32:
        return "the tables are not fp32"
    return why_not_computed(x.dtype)


Layout = tuple[int, int, int, int, int]
"""Where heads [s, b, k, g, d] lie: address, and strides of sequence, batch, group and head. Channels lie together."""
Segment = tuple[Layout, Layout, int, int, bool]
"""Heads to read and to write, how many, how many of a group, and whether they are rotated or copied."""
Parts = tuple[Tensor, Tensor, Tensor]
"""Query, key and value."""


def _launch(
    segments: tuple[Segment, ...],
    like_sbnd: Tensor,
    tables: tuple[Tensor, Tensor],
    ids_bs: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Rotate or copy heads that are like these in tokens, size and dtype."""
    cosine, sine = tables[0].contiguous(), tables[1].contiguous()
    ids_bs = None if ids_bs is None else ids_bs.long().contiguous()
    sequence, batch, _, head_size = like_sbnd.shape
    if ids_bs is None and cosine.shape[0] < sequence:
        raise ValueError(f"rotary tables of {cosine.shape[0]} positions are too short for {sequence} tokens")
    load_kernel("rotary").rotate(
        segments,
        address(cosine),
        address(sine),
        address(ids_bs),
        sequence,
        batch,
        head_size,
        2 * cosine.shape[-1],
        interleaved,
        -1.0 if inverse else 1.0,
        DTYPE_CODES[like_sbnd.dtype],
        *place(like_sbnd),
    )


def _layout(x_sbnd: Tensor, per_group: int) -> Layout:
    sequence, batch, head, _ = x_sbnd.stride()
    return address(x_sbnd), sequence, batch, per_group * head, head


def _segments(product_sbc: Tensor, parts: Parts, *, joins: bool) -> tuple[Segment, ...]:
    """Pair the heads of a product with the parts that are cut from it, or joined to it.

    Their places are computed: views of the product, made to ask them, would take the host longer than the launch.
    """
    query, key, _ = parts
    _, _, groups, head_size = key.shape
    per_group = query.shape[2] // groups
    sequence, batch, _ = product_sbc.stride()
    start, step, group = address(product_sbc), head_size * product_sbc.element_size(), (per_group + 2) * head_size
    kinds = ((0, per_group, True), (per_group, 1, True), (per_group + 1, 1, False))
    segments: list[Segment] = []
    for part, (first, count, is_rotated) in zip(parts, kinds, strict=True):
        inside, apart = (start + first * step, sequence, batch, group, head_size), _layout(part, count)
        source, target = (apart, inside) if joins else (inside, apart)
        segments.append((source, target, groups * count, count, is_rotated))
    return tuple(segments)


def _with_channels_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotate_cuda(
    x_sbnd: Tensor, cosine: Tensor, sine: Tensor, ids_bs: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    x_sbnd = _with_channels_together(x_sbnd)
    rotated = x_sbnd.new_empty(x_sbnd.shape)
    heads = x_sbnd.shape[2]
    segment = (_layout(x_sbnd, 1), _layout(rotated, 1), heads, 1, True)
    _launch((segment,), x_sbnd, (cosine, sine), ids_bs, interleaved, inverse)
    return rotated


def _rotate_cpu(
    x_sbnd: Tensor, cosine: Tensor, sine: Tensor, ids_bs: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    sine = -sine if inverse else sine
    rotated = apply_rotary(x_sbnd, cosine, sine, interleaved=interleaved, position_ids_bs=ids_bs)
    return rotated.contiguous()


def _rotate_fake(
    x_sbnd: Tensor, cosine: Tensor, sine: Tensor, ids_bs: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    return x_sbnd.new_empty(x_sbnd.shape)


def _empty_parts(product_sbc: Tensor, groups: int, head_size: int) -> Parts:
    s, b, channels = product_sbc.shape
    heads = channels // head_size - 2 * groups
    query, key, value = (product_sbc.new_empty((s, b, n, head_size)) for n in (heads, groups, groups))
    return query, key, value


def _split_cuda(
    product_sbc: Tensor,
    cosine: Tensor,
    sine: Tensor,
    ids_bs: Tensor | None,
    groups: int,
    head_size: int,
    interleaved: bool,
) -> Parts:
    product_sbc = _with_channels_together(product_sbc)
    parts = _empty_parts(product_sbc, groups, head_size)
    _launch(_segments(product_sbc, parts, joins=False), parts[0], (cosine, sine), ids_bs, interleaved, False)
    return parts


def _split_cpu(
    product_sbc: Tensor,
    cosine: Tensor,
    sine: Tensor,
    ids_bs: Tensor | None,
    groups: int,
    head_size: int,
    interleaved: bool,
) -> Parts:
    query, key, value = split_heads(product_sbc, groups, head_size)
    query, key = (_rotate_cpu(x, cosine, sine, ids_bs, interleaved, False) for x in (query, key))
    return query, key, value.clone(memory_format=torch.contiguous_format)


def _split_fake(
    product_sbc: Tensor,
    cosine: Tensor,
    sine: Tensor,
    ids_bs: Tensor | None,
    groups: int,
    head_size: int,
    interleaved: bool,
) -> Parts:
    return _empty_parts(product_sbc, groups, head_size)


def _join_cuda(
    query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor, ids_bs: Tensor | None, interleaved: bool
) -> Tensor:
    parts = _with_channels_together(query), _with_channels_together(key), _with_channels_together(value)
    product = _join_fake(query, key, value, cosine, sine, ids_bs, interleaved)
    _launch(_segments(product, parts, joins=True), query, (cosine, sine), ids_bs, interleaved, True)
    return product


def _join_cpu(
    query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor, ids_bs: Tensor | None, interleaved: bool
) -> Tensor:
    query, key = (_rotate_cpu(x, cosine, sine, ids_bs, interleaved, True) for x in (query, key))
    groups = query.unflatten(2, (key.shape[2], -1))
    return torch.cat((groups, key.unsqueeze(3), value.unsqueeze(3)), dim=3).flatten(2)


def _join_fake(
    query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor, ids_bs: Tensor | None, interleaved: bool
) -> Tensor:
    s, b, heads, head_size = query.shape
    return query.new_empty((s, b, (heads + 2 * key.shape[2]) * head_size))


_rotate = Operator(
    "rotate(Tensor x, Tensor cosine, Tensor sine, Tensor? position_ids, bool interleaved, bool inverse) -> Tensor",
    cuda=_rotate_cuda,
    cpu=_rotate_cpu,
    fake=_rotate_fake,
)
_split = Operator(
    "split_rotated(Tensor product, Tensor cosine, Tensor sine, Tensor? position_ids, int groups, int head_size,"
    " bool interleaved) -> (Tensor, Tensor, Tensor)",
    cuda=_split_cuda,
    cpu=_split_cpu,
    fake=_split_fake,
)
_join = Operator(
    "join_rotated(Tensor query, Tensor key, Tensor value, Tensor cosine, Tensor sine, Tensor? position_ids,"
    " bool interleaved) -> Tensor",
    cuda=_join_cuda,
    cpu=_join_cpu,
    fake=_join_fake,
)


def _keep_tables(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cosine, sine, ids_bs, *rest = inputs
    ctx.save_for_backward(cosine, sine, ids_bs)
    ctx.rest = rest
    ctx.shapes = [x.shape for x in output] if isinstance(output, tuple) else []


def _rotate_gradient(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    interleaved, inverse = ctx.rest
    grad_x = None if grad is None else _rotate(grad, *ctx.saved_tensors, interleaved, not inverse)
    return grad_x, None, None, None, None, None


def _split_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    some = next((grad for grad in grads if grad is not None), None)
    if some is None:
        return (None,) * 7
    whole = [some.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=True)]
    return _join(*whole, *ctx.saved_tensors, ctx.rest[-1]), None, None, None, None, None, None


_rotate.define_gradient(_rotate_gradient, _keep_tables)
_split.define_gradient(_split_gradient, _keep_tables)


class _Heads(torch.autograd.Function):
    """Views of the product, which an operator may not return."""

    @staticmethod
    def forward(ctx: Any, product_sbc: Tensor, groups: int, head_size: int) -> Parts:
        ctx.set_materialize_grads(False)
        parts = split_heads(product_sbc, groups, head_size)
        ctx.shapes = [part.shape for part in parts]
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None, None, None
        whole = [some.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=True)]
        table = some.new_empty((some.shape[0], 0), dtype=torch.float32)  # no channel is rotated
        return _join(*whole, table, table, None, False), None, None
