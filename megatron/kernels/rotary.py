"""Rotation of query and key channels by position, in plain torch (Su et al. 2021, "RoFormer").

Legend: s sequence, b batch, n heads, d head size, r <= d rotated channels (the first ones), p rows of the tables.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
