"""What differs between the run that saved a checkpoint and the one that loads it, and what each difference means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron.config.flags import spell
from megatron.config.sections import all_flags


class Kind(Enum):
    """What a difference means to a resumed run."""

    ARCHITECTURE = "the weights are of another model: an error"
    OPTIMIZER = "the optimizer's state is of another optimizer: an error, unless it is left"
    DATA = "other samples, or in another order: an error, unless it is said to be meant"
    LAYOUT = "the same training on other ranks, in other memory or other numbers: free, and told"
    NOTED = "the training goes on otherwise from here on: told"
    SILENT = "nothing that the training depends on, or compared by its effect elsewhere"


KIND_OF_SECTION = {
    "model": Kind.ARCHITECTURE,
    "parallel": Kind.LAYOUT,
    "kernels": Kind.NOTED,
    "training": Kind.NOTED,
    "optimizer": Kind.NOTED,
    "engine": Kind.LAYOUT,
    "data": Kind.SILENT,
    "checkpoint": Kind.SILENT,
    "reporting": Kind.SILENT,
}
"""Of every field that `KIND_OF_FIELD` does not name."""


def _kinds(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


KIND_OF_FIELD = {
    **_kinds(Kind.NOTED, "attention_dropout hidden_dropout init_method_std"),
    **_kinds(Kind.NOTED, "valid_data_path test_data_path deepspeed_config"),
    **_kinds(Kind.OPTIMIZER, "optimizer"),
    **_kinds(Kind.DATA, "seed seq_length reset_position_ids reset_attention_mask eod_mask_loss"),
    **_kinds(
        Kind.LAYOUT,
        "precision micro_batch_size accumulate_allreduce_grads_in_fp32 make_vocab_size_divisible_by "
        "fp32_residual_connection",
    ),
    # Schedules are compared as what comes of these flags, the training's length among them.
    **_kinds(
        Kind.SILENT,
        "lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_decay_tokens lr_warmup_fraction lr_warmup_iters "
        "lr_warmup_samples lr_warmup_tokens lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples "
        "lr_wsd_decay_tokens weight_decay start_weight_decay end_weight_decay weight_decay_incr_style",
    ),
    **_kinds(
        Kind.SILENT,
        "distributed_timeout_minutes exit_interval exit_duration_in_mins exit_signal_handler kill_switch_file "
        "eval_interval eval_iters skip_train max_nonfinite_steps",
    ),
}

STRETCHED = frozenset(
    {
        "rotary_base",
        "rotary_scaling_type",
        "rotary_scaling_factor",
        "rotary_original_max_positions",
        "rotary_low_freq_factor",
        "rotary_high_freq_factor",
        "rotary_beta_fast",
        "rotary_beta_slow",
        "rotary_attention_factor",
        "attention_window",
    }
)
"""Fields of the model that a new training may start with other values of: how it reads positions, for longer texts."""


@dataclass(frozen=True)
class Difference:
    """A field that has another value in the checkpoint than in this run."""

    section: str
    name: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{spell(self.name)} {_text(self.old)} -> {_text(self.new)}"


def find_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, weights_only: bool = False
) -> list[Difference]:
    """Compare the sections that a checkpoint was saved with to those of this run, both as JSON.

    A section that the checkpoint lacks says nothing; a field that the version which saved did not have had its default.

    Args:
        saved: sections of the checkpoint.
        current: sections of this run.
        weights_only: nothing but the weights is taken: only what they depend on is compared.
    """
    found = []
    for section, values in current.items():
        if section not in saved or (weights_only and section != "model"):
            continue
        old_values = saved[section]
        for name in sorted(set(values) | set(old_values)):
            old, new = old_values.get(name, _default(name)), values.get(name)
            if old != new:
                kind = _kind(section, name, values, weights_only=weights_only)
                found.append(Difference(section, name, old, new, kind))
    return [difference for difference in found if difference.kind is not Kind.SILENT]


def changed_values(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """List where two JSON values differ, as `path old -> new`; a list that is longer or shorter differs as a whole."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(set(old) | set(new)):
            yield from changed_values(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from changed_values(one, other, f"{path}[{index}]")
    elif old != new:
        yield f"{path} {_text(old)} -> {_text(new)}"


def listed(differences: Iterable[object]) -> str:
    """Join differences to one text."""
    return ", ".join(map(str, differences))


def _kind(section: str, name: str, model: Mapping[str, Any], *, weights_only: bool) -> Kind:
    kind = KIND_OF_FIELD.get(name, KIND_OF_SECTION[section])
    if kind is not Kind.ARCHITECTURE:
        return kind
    if name == "max_position_embeddings" and model.get("position_embedding_type") in ("rope", "none"):
        return Kind.NOTED  # there is no table of them
    if name in _idle(model):
        return Kind.SILENT
    return Kind.NOTED if weights_only and name in STRETCHED else kind


def _idle(model: Mapping[str, Any]) -> frozenset[str]:
    """Name the fields that mean nothing in a model of these values."""
    if model.get("position_embedding_type") != "rope":
        return frozenset(name for name in model if name.startswith("rotary_"))
    scaling = model.get("rotary_scaling_type", "none")
    names = {"rotary_scaling_factor"} if scaling == "none" else set()
    if scaling not in ("yarn", "llama3"):
        names.add("rotary_original_max_positions")
    if scaling != "llama3":
        names |= {"rotary_low_freq_factor", "rotary_high_freq_factor"}
    if scaling != "yarn":
        names |= {"rotary_beta_fast", "rotary_beta_slow", "rotary_attention_factor"}
    return frozenset(names)


def _default(name: str) -> Any:
    flag = all_flags().get(name)
    return None if flag is None or flag.required else flag.default


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) if value else "nothing"
    return "nothing" if value is None else str(value)
