"""Where compiled kernels are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(variables: Mapping[str, str] | None = None) -> Path:
    """Return MEGATRON_KERNEL_CACHE, or `megatron/kernels` in the user's cache folder.

    Every process that calls or builds a kernel must come to the same folder, with or without a launcher above it: so
    this is read here and not handed down.

    Args:
        variables: the environment; the process's own by default.
    """
    variables = os.environ if variables is None else variables
    if chosen := variables.get("MEGATRON_KERNEL_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron" / "kernels"
