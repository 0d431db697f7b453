"""From a folder of Hugging Face to a checkpoint, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.whole import write_checkpoint
from megatron.config.data import DataConfig
from megatron.config.model import ModelConfig
from megatron.config.rules import broken_model_rules
from megatron.config.sections import flags_in
from megatron.convert.hugging_face.config_file import read_their_config
from megatron.convert.hugging_face.errors import ConvertError
from megatron.convert.hugging_face.family import Entry
from megatron.convert.hugging_face.folder import (
    WeightFiles,
    check_tied_head,
    joined,
    match_names,
    precision_of,
    shapes,
)
from megatron.convert.hugging_face.model import empty_model
from megatron.convert.hugging_face.registry import family_of
from megatron.convert.hugging_face.tokenizer import tokenizer_flags
from megatron.parallel.sharding import Sharding, describe_sharding


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A checkpoint made of their model.

    Attributes:
        path: its folder.
        model: the architecture.
        data: vocabulary size and tokenizer.
        precision: in which the weights were kept.
        num_parameters: without the padding of the vocabulary.
    """

    path: Path
    model: ModelConfig
    data: DataConfig
    precision: str
    num_parameters: int


def import_model(source: Path, root: Path, *, precision: str | None = None, divisor: int | None = None) -> Imported:
    """Write a checkpoint, at iteration 0, of the model in a folder; everything but the values is checked before.

    Args:
        source: the folder, with config.json and safetensors files.
        root: the folder for `--load`.
        precision: that the run is told to train in; by default the one in which the weights are kept.
        divisor: `--make-vocab-size-divisible-by`.

    Raises:
        ConvertError: the model is of no family here, asks for something that is not there, or files are damaged.
        CheckpointError: there is a checkpoint of iteration 0 already.
    """
    config = read_their_config(source)
    family = family_of(config.get("model_type"), config.source)
    model = family.read_config(config)
    _check_model(model, config.source)
    if divisor is not None:
        model = ModelConfig(**{**asdict(model), "make_vocab_size_divisible_by": divisor})
    weights = WeightFiles(source)
    if model.num_layers > len(weights.names):
        raise ConvertError(
            f"{config.source}: {model.num_layers} layers, and the files hold {len(weights.names)} tensors: the two are "
            "not of one model"
        )
    entries = list(family.entries(model))
    names = match_names(family, entries, weights.names)
    vocab_size = config.count("vocab_size", weights.describe(names[entries[0].theirs[0]])[0].shape[0])
    shardings = describe_sharding(empty_model(model, vocab_size))
    num_parameters = _check_shapes(weights, entries, names, shardings)
    if not model.untie_embeddings_and_output_weights:
        check_tied_head(weights, names[entries[0].theirs[0]])
    precision = precision or precision_of(weights, names.values())
    data = DataConfig(**tokenizer_flags(source, vocab_size), seq_length=min(model.max_position_embeddings, 1024))
    path = write_checkpoint(
        root,
        _tensors(weights, entries, names, shardings),
        config=_sections(model, data, precision),
        iteration=0,
        paddings={name: sharding.padding for name, sharding in shardings.items() if sharding.padding},
    )
    return Imported(path=path, model=model, data=data, precision=precision, num_parameters=num_parameters)


def _check_model(model: ModelConfig, source: str) -> None:
    """Hold what came of their config against what a run's flags must be."""
    values = asdict(model)
    wrong = [flag for flag in flags_in("model") if not flag.takes(values[flag.name])]
    problems = [f"{flag.spelling} is not {flag.type_text}." for flag in wrong]
    if problems := problems or list(broken_model_rules(model)):
        raise ConvertError(f"{source} makes no model: {' '.join(problems)}")


def _check_shapes(
    weights: WeightFiles, entries: list[Entry], names: Mapping[str, str], shardings: Mapping[str, Sharding]
) -> int:
    """Compare what the files give to the logical shapes, padding left out; returns the number of parameters."""
    total = 0
    for name, tensor in shapes(weights, entries, names):
        sharding = shardings[name]
        rows, *others = sharding.logical_shape
        expected = (rows - sharding.padding, *others)
        if tuple(tensor.shape) != expected:
            raise ConvertError(
                f"{weights.folder}: {name} would be {tuple(tensor.shape)}, but config.json makes it {expected}: the "
                "two are not of one model"
            )
        total += tensor.numel()
    return total


def _tensors(
    weights: WeightFiles, entries: list[Entry], names: Mapping[str, str], shardings: Mapping[str, Sharding]
) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        tensor, padding = joined(weights, entry, names), shardings[entry.ours].padding
        if padding:
            tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
        yield entry.ours, tensor


def _sections(model: ModelConfig, data: DataConfig, precision: str) -> dict[str, Any]:
    """Give the sections that a run would have saved, of those that say something of the model."""
    return {
        "model": asdict(model),
        "data": asdict(data),
        "training": {"precision": precision},
        "optimizer": {"lr": 0.0},  # a run's config has one; nothing was trained here
    }
