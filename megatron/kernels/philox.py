"""Random bits as a function of a key and a counter, in plain torch: those that the kernels draw.

Philox4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Words of 32 bits are held
in int64, whose products keep their low 64 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = (0xD2511F53, 0xCD9E8D57)
STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF

STEPS_16 = 1 << 16
"""Values of the 16 bits that decide about one element."""
DRAWS = 8
"""Elements that share the 128 bits of one counter."""


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Turn the four words of each counter into four random words, under the two words of a key."""
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        x, y = a * FACTORS[0], c * FACTORS[1]
        a, b, c, d = _high(y) ^ b ^ first, y & LOW, _high(x) ^ d ^ second, x & LOW
        first, second = (first + STEPS[0]) & LOW, (second + STEPS[1]) & LOW
    return a, b, c, d


def keep_factors(shape: torch.Size, key: Tensor, first: int, threshold: int) -> Tensor:
    """Draw for each element 0, or what makes up for the dropped ones on average; fp32 of `shape`.

    Args:
        shape: of a tensor, or of a part of one that is contiguous in it.
        key: int64 [1].
        first: index of the part's first element in the whole tensor.
        threshold: an element is dropped when its 16 bits are below: probability x 65536.
    """
    count = shape.numel()
    start = first // DRAWS
    low = torch.arange(start, -(-(first + count) // DRAWS), device=key.device)
    zeros = torch.zeros_like(low)
    words = torch.stack(philox((key & LOW, _high(key)), (low & LOW, _high(low), zeros, zeros)), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()
    growth = torch.tensor(float(STEPS_16)) / (STEPS_16 - threshold)
    kept = bits[first - DRAWS * start :][:count].view(shape) >= threshold
    return kept.float() * growth.to(key.device)


def drop_threshold(probability: float) -> int:
    """Round a probability below one to 1/65536."""
    return min(round(probability * STEPS_16), STEPS_16 - 1)


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & LOW
