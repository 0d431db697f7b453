"""What follows from plain values alone: made once, shared by all layers, a constant to `torch.compile`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

COMPILERS_MARK = "_dynamo_marked_constant"

P = ParamSpec("P")
T = TypeVar("T")


def cached_constant(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function of hashable values that makes tensors for reading; keep its last `maxsize` results."""

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        @functools.lru_cache(maxsize=maxsize)
        def cached(*args: P.args, **kwargs: P.kwargs) -> T:
            with torch.inference_mode(False):  # made while generating, it must serve a later backward
                return make(*args, **kwargs)

        @functools.wraps(make)
        def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
            return cached(*args, **kwargs)  # type: ignore[arg-type]

        # The compiler would look through lru_cache and make the tensor again in every call of every layer. The mark is
        # that of torch.compiler.assume_constant_result, which imports the compiler: seconds of every start without it.
        setattr(look_up, COMPILERS_MARK, True)
        return look_up

    return decorate
