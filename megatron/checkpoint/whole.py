"""A complete checkpoint from logical tensors, written by one process that never holds more than a file of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.commit import Content, commit, open_staging
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import Digest, write_tensors
from megatron.checkpoint.fragments import (
    LARGEST_FILE,
    WEIGHT,
    Fragment,
    fragment_key,
    fragment_record,
    tensors_file,
)
from megatron.checkpoint.names import tag_of
from megatron.checkpoint.retention import remove
from megatron.checkpoint.state_file import COUNTERS
from megatron.parallel.sharding import Sharding


def write_checkpoint(
    root: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any],
    iteration: int,
    paddings: Mapping[str, int] | None = None,
    states: Iterable[tuple[str, str, Tensor]] = (),
    counters: Mapping[str, int] | None = None,
    engine: Mapping[str, Any] | None = None,
    largest_file: int = LARGEST_FILE,
) -> Path:
    """Write a checkpoint that any layout can load, and point `latest` to it.

    Args:
        root: the folder for `--load`; made where it is missing.
        tensors: name and logical tensor of every weight, vocabulary padding included; taken one after the other.
        config: for `config.json`: at least the section `model`, as a run has it.
        iteration: of the checkpoint.
        paddings: of those tensors that have one: how many rows at their end hold nothing.
        states: name, kind and logical tensor of each state of the optimizer; without any, a run loads the weights
            only.
        counters: what else the run has counted, such as `consumed_samples`.
        engine: what the engine keeps beside tensors, such as the optimizer's step.
        largest_file: bytes of tensors after which a file is full.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: the folder holds that iteration already, a name comes twice, or a counter is unknown.
        OSError: it cannot be written; `latest` is as it was.
    """
    tag = tag_of(iteration)
    if (root / tag).exists():
        raise CheckpointError(f"{root / tag} is there already: give another folder, or remove it first")
    counted = {**dict.fromkeys(COUNTERS, 0), **(counters or {}), "iteration": iteration}
    if unknown := sorted(set(counted) - set(COUNTERS)):
        raise CheckpointError(f"a run does not count {', '.join(unknown)}, only {', '.join(COUNTERS)}")
    staging = open_staging(root, tag)
    try:
        kinds = chain(((name, WEIGHT, tensor) for name, tensor in tensors), states)
        records, files = _write_tensors(staging, kinds, paddings or {}, largest_file)
        state = {"counters": counted, "layout": {}, "engine": dict(engine or {})}
        return commit(root, staging, tag, Content(files=files, tensors=records, state=state, config=config))
    except BaseException:
        remove(staging)
        raise


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, str, Tensor]], paddings: Mapping[str, int], largest_file: int
) -> tuple[list[dict[str, Any]], dict[str, Digest]]:
    records: list[dict[str, Any]] = []
    files: dict[str, Digest] = {}
    for index, share in enumerate(_shares(tensors, paddings, largest_file)):
        file = tensors_file(0, index)
        files[file] = write_tensors(folder / file, {fragment_key(item): item.tensor for item in share})
        records += [fragment_record(item, file) for item in share]
    return records, files


def _shares(
    tensors: Iterable[tuple[str, str, Tensor]], paddings: Mapping[str, int], largest_file: int
) -> Iterator[list[Fragment]]:
    share: list[Fragment] = []
    filled, dtype = 0, None
    for name, kind, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if share and (filled + size > largest_file or tensor.dtype != dtype):  # one dtype a file keeps it aligned
            yield share
            share, filled = [], 0
        padding = paddings.get(name, 0)
        sharding = Sharding(logical_shape=tuple(tensor.shape), dim=0 if padding else None, padding=padding)
        share.append(Fragment(name, kind, sharding, 0, tensor.detach().contiguous().flatten()))
        filled, dtype = filled + size, tensor.dtype
        del tensor  # nothing but the share holds it while the next one is made
    if share:
        yield share
