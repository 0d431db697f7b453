"""From a checkpoint, saved under any layout, to a folder of Hugging Face: never more than one of its files in memory.

Everything is written into a hidden folder beside the target, which is then renamed: a target is whole, or not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.files import sync_folder, write_tensors
from megatron.checkpoint.fragments import LogicalTensors
from megatron.config.data import DataConfig
from megatron.config.model import ModelConfig
from megatron.convert.hugging_face.config_file import CONFIG, GENERATION_CONFIG
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.family import Entry, Family
from megatron.convert.hugging_face.folder import INDEX, SINGLE
from megatron.convert.hugging_face.registry import FAMILIES, family_for, family_of
from megatron.convert.hugging_face.tokenizer import SPECIAL_TOKENS, copy_tokenizer, special_tokens, their_neighbours

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""As config.json has them."""

MAX_SHARD_BYTES = 5 * 10**9
HIDDEN_SUFFIX = ".staging"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder made of a checkpoint.

    Attributes:
        path: the folder.
        model_type: its family.
        num_parameters: without the padding of the vocabulary.
        num_bytes: of the weights.
        tokenizer: the tokenizer's files in it.
    """

    path: Path
    model_type: str
    num_parameters: int
    num_bytes: int
    tokenizer: list[str]


def export_model(
    tensors: LogicalTensors,
    target: Path,
    *,
    model: ModelConfig,
    data: DataConfig,
    precision: str = "fp32",
    model_type: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> Exported:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        tensors: of the checkpoint.
        target: the folder, which must not be there.
        model: the section of the run.
        data: the section of the run, for the tokenizer's files.
        precision: fp32, bf16 or fp16: the dtype of the weights.
        model_type: the family; by default that of the folder the tokenizer lies in, or else the first one that has all
            the model has.
        max_shard_bytes: of tensors in a file; a larger tensor has a file of its own.
        replace: put it in the place of a folder that is there.

    Raises:
        ConvertError: the family does not have what the model has, or the target is there.
        CheckpointError: tensors are missing or damaged.
    """
    if target.exists() and not replace:
        raise ConvertError(f"{target} exists: give another folder, or remove it first")
    config, generation = their_neighbours(data)
    family = _choose_family(model, model_type, config.get("model_type"))
    written = family.write_config(model)
    entries = list(family.entries(model))
    _check_names(tensors, entries, family)
    vocab_size = tensors.shape(entries[0].ours)[0] - tensors.padding(entries[0].ours)
    ids = {key: config[key] for key in SPECIAL_TOKENS if config.get(key) is not None} or special_tokens(data)
    ids = {key: ids.get(key) for key in SPECIAL_TOKENS}  # said to be none, or a family's own ids would be taken
    written |= {"vocab_size": vocab_size, "torch_dtype": DTYPE_NAMES[precision], "use_cache": True, **ids}
    shards = _plan(tensors, entries, DTYPES[precision], max_shard_bytes)
    staging = target.with_name(f".{target.name}{HIDDEN_SUFFIX}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        num_bytes, num_parameters = _write_weights(staging, tensors, shards, DTYPES[precision])
        _write_json(staging / CONFIG, written)
        _write_json(staging / GENERATION_CONFIG, generation or {"_from_model_config": True, **ids})
        copied = copy_tokenizer(data, staging)
        sync_folder(staging)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # what did not get its name is of no use
    return Exported(
        path=target, model_type=family.model_type, num_parameters=num_parameters, num_bytes=num_bytes, tokenizer=copied
    )


def _choose_family(model: ModelConfig, wanted: str | None, neighbour: str | None) -> Family:
    if wanted is not None:
        return family_of(wanted, "--model-type")
    if neighbour in FAMILIES:
        try:
            FAMILIES[neighbour].write_config(model)
        except ConvertError:
            return family_for(model)
        return FAMILIES[neighbour]
    return family_for(model)


def _check_names(tensors: LogicalTensors, entries: Sequence[Entry], family: Family) -> None:
    expected, found = {entry.ours for entry in entries}, set(tensors.names)
    if difference := sorted(expected ^ found):
        what = "lacks" if difference[0] in expected else "holds, beside what the model has,"
        raise ConvertError(
            f"{tensors.folder} {what} {difference[0]} ({len(difference)} such names as a {family.model_type}): its "
            "tensors and its config are not of one model"
        )


def _plan(
    tensors: LogicalTensors, entries: Sequence[Entry], dtype: torch.dtype, max_bytes: int
) -> list[list[tuple[Entry, int]]]:
    """Divide the entries, each with its bytes, over files; what an entry holds is in one file."""
    shards: list[list[tuple[Entry, int]]] = [[]]
    filled = 0
    for entry in entries:
        rows, *others = tensors.shape(entry.ours)
        kept = torch.empty((rows - tensors.padding(entry.ours), *others), dtype=dtype, device="meta")
        size = kept.numel() * kept.element_size()
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((entry, size))
        filled += size
    return shards


def _write_weights(
    folder: Path, tensors: LogicalTensors, shards: Sequence[Sequence[tuple[Entry, int]]], dtype: torch.dtype
) -> tuple[int, int]:
    """Write the files and their index; returns the bytes of all tensors and the number of parameters."""
    file_of: dict[str, str] = {}
    parameters = 0
    for index, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        held = {name: x for entry, _ in shard for name, x in _theirs(tensors, entry, dtype)}
        write_tensors(folder / file, held, {"format": "pt"})
        file_of |= dict.fromkeys(held, file)
        parameters += sum(x.numel() for x in held.values())
        del held  # before the next file's tensors are read
    total = sum(size for shard in shards for _, size in shard)
    if len(shards) > 1:
        metadata = {"total_size": total, "total_parameters": parameters}
        _write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(file_of.items()))})
    return total, parameters


def _theirs(tensors: LogicalTensors, entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Make their tensors of one of ours, each with memory of its own."""
    ours = tensors.read(entry.ours)
    ours = ours[: len(ours) - tensors.padding(entry.ours)]
    for name, tensor in zip(entry.theirs, entry.transform.split(ours), strict=True):
        theirs = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if dtype == torch.float16 and theirs.isinf().any() and not tensor.isinf().any():
            raise ConvertError(f"{name} has values up to {tensor.abs().max():.3g}, which fp16 cannot hold: use bf16")
        yield name, theirs


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(staging: Path, target: Path) -> None:
    """Give the finished folder its name; one that it replaces goes out of the way first."""
    old = target.with_name(f".{target.name}.removed{HIDDEN_SUFFIX}")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    staging.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
