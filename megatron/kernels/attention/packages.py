"""What the backends of optional packages share: which version is there, which GPU, and their layouts.

Legend: s sequence, b batch, n query heads, k key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch
from torch import Tensor

from megatron.kernels.attention.documents import PackedDocuments
from megatron.kernels.constant import cached_constant


def why_not_installed(name: str, oldest: tuple[int, ...], extra: str) -> str | None:
    """Say what to install where a package is missing or too old; None when it is there.

    Args:
        name: of the package for pip.
        oldest: the first version that will do.
        extra: the optional dependency of this project that brings it.
    """
    remedy = f"pip install 'megatron-deepspeed[{extra}]'"
    found = installed_version(name)
    if found is None:
        return f"{name} is not installed: {remedy}"
    if found < oldest:
        wanted, here = (".".join(map(str, numbers)) for numbers in (oldest, found))
        return f"{name} {here} is older than {wanted}: {remedy}"
    return None


def installed_version(name: str) -> tuple[int, ...] | None:
    """Return the leading numbers of a package's version; None where it is not installed."""
    try:
        words = version(name).split(".")
    except PackageNotFoundError:
        return None
    return tuple(int(word) for word in words[:2] if word.isdigit())


def why_overwritten(name: str, path: str) -> str | None:
    """Say that another package wrote over a file of this one; None when it is as it was installed.

    Args:
        name: the package for pip.
        path: the file, as its list of installed files has it.
    """
    for file in distribution(name).files or ():
        if file.as_posix() == path and file.size is not None:
            found = Path(str(file.locate()))
            if not found.is_file() or found.stat().st_size != file.size:
                return f"another package wrote over its {path}: pip install --force-reinstall --no-deps {name}"
    return None


def same_bits_wanted() -> bool:
    """Say whether torch is asked for the same bits every time: backward may add atomically otherwise, and is faster."""
    return torch.are_deterministic_algorithms_enabled()


def why_not_on_gpu(capability: tuple[int, int]) -> str | None:
    """Say that the GPU is too old or not there; None when it will do."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < capability:
        return f"it needs an NVIDIA GPU of compute capability {capability[0]}.{capability[1]} or later"
    return None


def attend_packed(
    attend: Callable[..., Tensor],
    query_sbnd: Tensor,
    key_sbkd: Tensor,
    value_sbkd: Tensor,
    documents: PackedDocuments,
) -> Tensor:
    """Attend inside of documents: lay the samples one behind another, [b x s, heads, d], and back.

    Args:
        attend: takes packed query, key, value, the offsets of queries and of keys, and the greatest lengths of both.
        query_sbnd: [s, b, n, d].
        key_sbkd: [s, b, k, d].
        value_sbkd: likewise.
        documents: where they begin.
    """
    length, batch = query_sbnd.shape[:2]
    packed = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query_sbnd, key_sbkd, value_sbkd))
    offsets, longest = documents.offsets, documents.max_length
    output = attend(*packed, offsets, offsets, longest, longest)
    return output.unflatten(0, (batch, length)).transpose(0, 1)


@cached_constant(maxsize=8)
def whole_samples(batch: int, length: int, device: torch.device) -> Tensor:
    """Give the offsets of samples that are a document each: int32 [b + 1]."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device="cpu").to(device)
