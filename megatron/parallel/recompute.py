"""Activation recompute: backward runs a part of the model again instead of keeping its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recompute(function: Callable[..., T], *args: object) -> T:
    """Call `function(*args)`, keep only `args`, and call it again when backward needs what it computed.

    Dropout draws the same numbers both times. torch restores its default generators for the second call and puts them
    back after it; the streams of single ranks (`random.rank_stream`) are derived from these, so they repeat as well.
    Collectives inside are repeated too, on all ranks alike.

    Args:
        function: any computation that gives the same result from the same arguments and random state.
        args: tensors on the device the function draws its random numbers on, and anything else.
    """
    # Non-reentrant, because that one nests, takes any arguments and leaves parameters' hooks alone.
    result: T = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True)
    return result
