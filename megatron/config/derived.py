"""Values that follow from several sections, filled in where nobody gave them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config import deepspeed_json
from megatron.config.errors import ConfigError
from megatron.config.parallel import ParallelConfig
from megatron.config.sections import RunConfig


def data_parallel_size(parallel: ParallelConfig, world_size: int | None) -> int:
    """Give the number of ranks that hold different samples: what the other axes leave of the world, at least 1."""
    others = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.ds_sequence_parallel_size
    )
    return max((world_size or 1) // max(others, 1), 1)


@dataclass(frozen=True)
class Derivation:
    """How one field of a section is computed, from the run config so far and the data-parallel size."""

    section: str
    field: str
    compute: Callable[[RunConfig, int], Any]


def _global_batch_size(config: RunConfig, data_size: int) -> int:
    return config.training.micro_batch_size * data_size


def _max_position_embeddings(config: RunConfig, _: int) -> int:
    return config.data.seq_length


def _rotary_original_max_positions(config: RunConfig, _: int) -> int:
    return max(round(config.model.max_position_embeddings / max(config.model.rotary_scaling_factor, 1.0)), 1)


def _rotary_attention_factor(config: RunConfig, _: int) -> float:
    if config.model.rotary_scaling_type != "yarn":
        return 1.0
    return 0.1 * math.log(max(config.model.rotary_scaling_factor, 1.0)) + 1.0


def _zero_stage(_: RunConfig, __: int) -> int:
    return 1


def _tokenizer_type(config: RunConfig, _: int) -> str | None:
    data = config.data
    files = data.tokenizer_model or data.vocab_file or data.merge_file
    return "NullTokenizer" if data.vocab_size and not files else None


DERIVATIONS = (
    Derivation("training", "global_batch_size", _global_batch_size),
    Derivation("model", "max_position_embeddings", _max_position_embeddings),
    Derivation("model", "rotary_original_max_positions", _rotary_original_max_positions),
    Derivation("model", "rotary_attention_factor", _rotary_attention_factor),
    Derivation("engine", "zero_stage", _zero_stage),
    Derivation("data", "tokenizer_type", _tokenizer_type),
)
"""In this order: a later one may read what an earlier one filled in."""


def derive(config: RunConfig, world_size: int | None) -> RunConfig:
    """Fill in every field that follows from others and was not given.

    Args:
        config: the sections as given.
        world_size: number of ranks; None counts as one data-parallel rank.
    """
    data_size = data_parallel_size(config.parallel, world_size)
    for item in DERIVATIONS:
        section = getattr(config, item.section)
        if getattr(section, item.field) is None:
            section = dataclasses.replace(section, **{item.field: item.compute(config, data_size)})
            config = dataclasses.replace(config, **{item.section: section})
    return config


def batch_sizes_from_accumulation(
    values: Mapping[str, Any], user: Mapping[str, Any], data_size: int, file: str
) -> dict[str, int]:
    """Compute the batch size that `gradient_accumulation_steps` in the user's DeepSpeed JSON implies.

    Args:
        values: what flags and file gave, by field name.
        user: the user's DeepSpeed dictionary.
        data_size: number of data-parallel ranks.
        file: name of the JSON, for the sentences.

    Returns:
        The implied value by field name; empty when the file does not say, or all three agree already.

    Raises:
        ConfigError: the three numbers contradict each other, or the batch size is to grow.
    """
    steps = deepspeed_json.accumulation_steps(user)
    if steps is None:
        return {}
    said = f"{deepspeed_json.ACCUMULATION} in {file} is {steps}"
    if values.get("rampup_batch_size"):
        raise ConfigError([f"{said}, but --rampup-batch-size changes it during the run: remove it from the file."])
    batch, micro = values.get("global_batch_size"), values.get("micro_batch_size")
    if batch is None:
        return {"global_batch_size": (micro or 1) * data_size * steps}
    if micro is None and batch % (data_size * steps) == 0:
        return {"micro_batch_size": batch // (data_size * steps)}
    if (micro or 1) * data_size * steps == batch:
        return {}
    product = f"--micro-batch-size {micro or 1} x {data_size} data-parallel ranks x {steps}"
    raise ConfigError([f"{said}, but --global-batch-size {batch} is not {product}: remove one of them from the file."])
