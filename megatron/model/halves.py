"""Blocks over a micro-batch in two halves: while shards of one half travel between tensor ranks, the other computes.

With sequence parallelism a block waits for its tensor group four times: attention and MLP each gather the sequence before
their first product and sum over the ranks after their last. The halves take turns, which end where a collective has been
started or is about to be waited for; a half waits no earlier than its next turn, and one of the other's lies between:

    first half   | norm | up |      | down |    | norm | qkv |      | attend |     | norm | ...
    second half  |           | norm |      | up |            | norm |        | qkv |
    under way           <a 1>   <b 2>  <a 2> <b 1> ...

"norm" waits for the sum before it and starts to gather, "up" and "qkv" wait for what is gathered, and "down" and "attend"
start the sum over the ranks (the ideas are those of Wang et al. 2024, "Domino", arXiv:2409.15241, and of two micro-batches in turns).

Backward needs nothing of its own: autograd runs what is ready in the reverse order of forward, so the halves take turns
there as well, and each collective's conjugate travels beside the other half.

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

Turns = Generator[None, None, Tensor]
"""Stops after each turn, and returns the result of the last."""


def run_in_halves(blocks: Sequence[nn.Module], hidden: Tensor, context: Context) -> Tensor:
    """Take hidden states [s/t, b, h] through blocks; b is even, and `context.halves` says what each half may read."""
    if context.halves is None:
        raise ValueError("the context of a micro-batch in halves has one for each of them")
    halves = (half.contiguous() for half in hidden.chunk(2, dim=1))
    first, second = (_turns(blocks, half, own) for half, own in zip(halves, context.halves, strict=True))
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
