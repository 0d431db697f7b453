"""How the blocks of a model are divided over the stages of a pipeline, in plain integers."""

from __future__ import annotations

from collections.abc import Sequence


def balance_blocks(num_blocks: int, num_stages: int, *, last: float = 0.0) -> tuple[int, ...]:
    """Choose how many blocks each stage holds, so that the slowest stage is as fast as it can be.

    Args:
        num_blocks: blocks of the model.
        num_stages: stages of the pipeline; each gets at least one block.
        last: cost of what the last stage computes besides its blocks, the output head, in blocks.

    Returns:
        blocks of each stage. Among equals the later stage gets the block, since an earlier one keeps the activations
        of more micro-batches.

    Raises:
        ValueError: there are fewer blocks than stages.
    """
    if num_blocks < num_stages:
        raise ValueError(f"{num_blocks} blocks cannot be divided over {num_stages} stages: each needs one")
    counts = [1] * num_stages
    costs = [1.0] * num_stages
    costs[-1] += last
    for _ in range(num_blocks - num_stages):
        stage = min(reversed(range(num_stages)), key=costs.__getitem__)
        counts[stage] += 1
        costs[stage] += 1
    return tuple(counts)


def stage_parts(counts: Sequence[int]) -> list[range]:
    """Give the layers of each stage: two before the blocks belong to the first, the two after them to the last.

    The layers are numbered as `GPT.stages()` orders them: word embedding, positions, blocks, final norm, output head.
    """
    stops = [2 + sum(counts[: stage + 1]) for stage in range(len(counts))]
    stops[-1] += 2
    return [range(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
