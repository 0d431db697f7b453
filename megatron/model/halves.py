"""Blocks over a micro-batch in two halves: while shards of one travel between tensor ranks, the other computes.

With sequence parallelism a block needs its tensor group four times: attention and MLP each gather the sequence before
their first product, and sum over the ranks after their last. The halves take turns, and whatever a half starts at the
end of one turn it waits for in its next, after one of the other half:

    computes |norm 1|        |qkv 1|norm 2|attend 1|qkv 2|norm 1|attend 2|up 1 |norm 2| down 1 |up 2 |norm 1| ...
    travels         |gather 1|            |gather 2|sum 1|      |gather 1|sum 2|      |gather 2|sum 1|      | ...

"norm" has the residual sum before it, "attend" the product of attention's output after it. Only the first gathering and
the last sum have nothing beside them.

Backward needs nothing of its own. Of the nodes that are ready, autograd runs the one that forward made last, so that
the halves take the same turns in reverse order, each with the conjugate of its collective. The idea of two halves is
that of Wang et al. 2024, "Domino: eliminating communication in LLM training via generic tensor slicing and
overlapping", arXiv:2409.15241.

Legend: s sequence, b micro-batch, h hidden, t tensor ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.model.block import Block
from megatron.model.context import Context
from megatron.parallel.gradient_sums import read_together
from megatron.parallel.groups import Group

Turns = Generator[None, None, Tensor]
"""Stops after each turn, and returns the result of the last."""


def run_in_halves(blocks: Sequence[nn.Module], hidden: Tensor, context: Context, *, group: Group) -> Tensor:
    """Take hidden states [s/t, b, h] through blocks.

    Args:
        blocks: consecutive ones.
        hidden: of a micro-batch whose b is even.
        context: `halves` says what each half may read.
        group: the tensor group.

    Raises:
        ValueError: the context has no halves.
    """
    if context.halves is None:
        raise ValueError("the context of a micro-batch in halves has one for each of them")
    halves = (half.contiguous() for half in hidden.chunk(2, dim=1))
    first, second = (_turns(blocks, half, own) for half, own in zip(halves, context.halves, strict=True))
    readers = [reader for block in blocks if isinstance(block, Block) for reader in block.readers]
    with read_together(readers, group):
        return torch.cat(alternate(first, second), dim=1)


def alternate(first: Turns, second: Turns) -> list[Tensor]:
    """Take both halves through their turns, the first one ahead by one; returns their results."""
    next(first)
    results: list[Tensor] = []
    waiting = deque((first, second))
    while waiting:
        half = waiting.popleft()
        try:
            next(half)
        except StopIteration as end:
            results.append(end.value)
        else:
            waiting.append(half)
    return results


def _turns(blocks: Sequence[nn.Module], hidden: Tensor, context: Context) -> Turns:
    """Take one half through blocks; a block is left in the turn in which the next one is entered."""
    branch: Any = None
    for block in blocks:
        if not isinstance(block, Block):
            raise TypeError(f"a {type(block).__name__} takes no turns")
        for turn in block.turns:
            hidden, branch = turn(hidden, branch, context)
            yield
        hidden = block.leave(hidden, branch)
    return hidden
