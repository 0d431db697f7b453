"""Matrices in 8 bits: one scale each, and the two copies that products want, in plain torch and in one pass.

A product of 8-bit matrices sums along what lies together in memory of both of them, so that a matrix is needed as it
is where its columns are summed over, and transposed where its rows are. Formats (Micikevicius et al. 2022,
arXiv:2209.05433):

| format | largest | digits after the point | smallest normal number, of the largest |
|--------|---------|------------------------|----------------------------------------|
| E4M3   | 448     | 3                      | 2^-14.8                                |
| E5M2   | 57344   | 2                      | 2^-29.8                                |

A scale is the smallest power of two that brings the largest number of the matrix into the format's range. A power of
two, so that a number keeps the same digits under any scale: ranks and chunks with scales of their own compute with the
numbers that a single scale gives, down to those too small for its range. Of the matrix itself, not of those of earlier
steps: nothing is to be kept in checkpoints, and nothing is cut off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.kernels.build import load_kernel
from megatron.kernels.operator import Operator, address, place

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {E4M3: 0, E5M2: 1}
"""Their numbers in `csrc/fp8/fp8.h`."""
TOP_EXPONENTS = {E4M3: 8, E5M2: 15}
"""Of the formats' largest numbers, which are 1.75 x 2^8 and 1.75 x 2^15."""
MULTIPLE = 16
"""Of which matrix units take matrices of 8 bits: what is summed over, and the columns of the result."""


class Quantised(NamedTuple):
    """A matrix [n, k] in 8 bits; what was not asked for is None.

    Attributes:
        scale: fp32 [1], what its numbers are to be multiplied with.
        by_row: [n, k].
        by_column: [k, n'], n' the next multiple of 16 and zeros in the rows that are more.
        sums: [k], over the rows of the matrix as it was, in its dtype.
    """

    scale: Tensor
    by_row: Tensor | None
    by_column: Tensor | None
    sums: Tensor | None = None


def quantise(
    x: Tensor, dtype: torch.dtype, *, by_row: bool = True, by_column: bool = True, sums: bool = False
) -> Quantised:
    """Bring a matrix [n, k] into 8 bits, k a multiple of 16."""
    return _named(_quantise_plain(x, FORMATS[dtype], by_row, by_column, sums), by_row, by_column, sums)


def fused_quantise(
    x: Tensor, dtype: torch.dtype, *, by_row: bool = True, by_column: bool = True, sums: bool = False
) -> Quantised:
    """Do as `quantise`, in a pass that finds the largest number and one that makes all the rest."""
    return _named(_quantise(x, FORMATS[dtype], by_row, by_column, sums), by_row, by_column, sums)


def _named(made: tuple[Tensor, ...], by_row: bool, by_column: bool, sums: bool) -> Quantised:
    scale, rows, columns, summed = made
    return Quantised(scale, rows if by_row else None, columns if by_column else None, summed if sums else None)


def scale_for(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the power of two that brings numbers up to `largest`, fp32, into the format, and its inverse.

    Neither is a number where `largest` is not finite: what comes of the matrix is none then, and is noticed.
    """
    bits = largest.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    down = (exponent - TOP_EXPONENTS[dtype] + (mantissa > 0x600000)).clamp(1, 252).to(torch.int32)
    finite = torch.where(exponent == 255, torch.nan, 1.0)
    return ((254 - down) << 23).view(torch.float32) * finite, (down << 23).view(torch.float32) * finite


def padded(rows: int) -> int:
    """Round a number of rows up to what a sum may run over."""
    return -(-rows // MULTIPLE) * MULTIPLE


Made = tuple[Tensor, Tensor, Tensor, Tensor]
"""The scale and what was asked for, in the order of `Quantised`; empty where it was not."""


def _quantise_cuda(x: Tensor, form: int, by_row: bool, by_column: bool, sums: bool) -> Made:
    x = x.contiguous()
    kernel, (device, stream), (rows, columns) = load_kernel("fp8"), place(x), x.shape
    parts = kernel.parts(x.numel(), device)
    largest = x.new_empty(parts, dtype=torch.float32)
    kernel.largest(address(x), address(largest), x.numel(), parts, device, stream)
    scale, as_rows, as_columns, summed = made = _quantise_fake(x, form, by_row, by_column, sums)
    partial = x.new_empty((kernel.tiles(rows), columns), dtype=torch.float32) if sums else None
    kernel.quantise(
        address(x),
        address(largest),
        parts,
        address(scale),
        address(as_rows),
        address(as_columns),
        address(summed),
        address(partial),
        rows,
        padded(rows),
        columns,
        form,
        device,
        stream,
    )
    return made


def _quantise_plain(x: Tensor, form: int, by_row: bool, by_column: bool, sums: bool) -> Made:
    dtype, (rows, columns) = _dtype(form), x.shape
    up, down = scale_for(x.abs().amax().float().reshape(1), dtype)
    small = (x.float() * up).to(dtype)
    as_columns = x.new_zeros((columns, padded(rows)) if by_column else 0, dtype=dtype)
    if by_column:
        as_columns[:, :rows] = small.t()
    summed = x.float().sum(0).to(x.dtype) if sums else x.new_empty(0)
    return down, small if by_row else x.new_empty(0, dtype=dtype), as_columns, summed


def _quantise_fake(x: Tensor, form: int, by_row: bool, by_column: bool, sums: bool) -> Made:
    dtype, (rows, columns) = _dtype(form), x.shape
    return (
        x.new_empty(1, dtype=torch.float32),
        x.new_empty((rows, columns) if by_row else 0, dtype=dtype),
        x.new_empty((columns, padded(rows)) if by_column else 0, dtype=dtype),
        x.new_empty(columns if sums else 0),
    )


def _dtype(form: int) -> torch.dtype:
    return next(dtype for dtype, number in FORMATS.items() if number == form)


_quantise = Operator(
    "fp8_quantise(Tensor x, int form, bool by_row, bool by_column, bool sums) -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_quantise_cuda,
    cpu=_quantise_plain,
    fake=_quantise_fake,
)
