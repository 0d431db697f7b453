"""Keeps torch's compiler from being loaded by those who only tell it to stay away: that takes seconds of each start."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from deepspeed.runtime import compiler
from torch.optim import SGD, Adam, AdamW, Optimizer


def import_muon() -> None:
    """Import DeepSpeed's Muon, as DeepSpeed does itself for every optimizer.

    Its functions, which nothing here calls, are decorated with `torch.compile`.
    """
    own = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = own


def keep_off_optimizers() -> None:
    """Let torch's optimizers run as they are, for processes that compile none of them.

    Their methods load the compiler to have themselves left alone by it, and `step` to break its graph. Without that
    they do the same. Where torch is written in another way than 2.11 and 2.13 are, they stay as they are, only slower.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, _LEFT_ALONE):
            setattr(method, _LEFT_ALONE, method)
    kinds: tuple[Any, ...] = (Adam, AdamW, SGD)
    for kind in kinds:
        step: Any = vars(kind).get("step")
        if getattr(getattr(step, "__code__", None), "co_name", None) == "_use_grad":
            # What it does else is to allow steps that are differentiated, which nothing here asks for.
            kind.step = torch.no_grad()(step.__wrapped__)


_LEFT_ALONE = "__dynamo_disable"
"""Where torch keeps of a function the one that the compiler leaves alone."""
