"""What `state.json` and `config.json` say: every entry that a reader uses, and what it must be.

    {"counters":  {"iteration": 500, "consumed_samples": 4000, ...},
     "layout":    {"data_parallel_size": 2, ...},             empty where one process wrote it
     "engine":    {"optimizer": {"type": "adam", "step": 500, "kinds": [...]}, "loss_scaler": null},
     "training":  {"run": {...}, "vocab_size": 50257, "next_samples": {...}}}    absent in converted ones

`config.json` has the sections of the run, of which any may be absent, and in them the fields of `megatron.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import read_json
from megatron.checkpoint.names import CONFIG, STATE
from megatron.checkpoint.schema import (
    BITS,
    COUNT,
    NUMBER,
    OBJECT,
    POSITIVE,
    TEXT,
    Both,
    Entries,
    Items,
    MisfitError,
    Named,
    Nullable,
    OneOf,
    Row,
    Shape,
    counts,
)
from megatron.config.errors import ConfigError
from megatron.config.rules import broken_model_rules
from megatron.config.sections import RunConfig, all_flags, flags_in

COUNTERS = (
    "iteration",
    "consumed_samples",
    "consumed_tokens",
    "skipped_steps",
    "nonfinite_steps",
    "nonfinite_streak",
)
"""What a run counts."""


class _Section(Shape):
    """Values of a section's flags; fields that this program does not know are passed over."""

    def __init__(self, section: str) -> None:
        super().__init__("an object", lambda value: isinstance(value, Mapping))
        self._flags = {flag.name: flag for flag in flags_in(section)}

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        super().check(value)
        for name, item in value.items():
            flag = self._flags.get(name)
            if flag is not None and not flag.takes(item):
                raise MisfitError.of(item, flag.type_text, name)


class _Samples(Shape):
    """What a dataset says of its samples, by its kind; see `SampleDataset.description`."""

    def __init__(self) -> None:
        super().__init__("an object", lambda value: isinstance(value, Mapping))
        file = {"name": TEXT, "idx_sha256": TEXT, "bin_sample_sha256": TEXT, "documents": Row(COUNT, COUNT)}
        blend = {"shares": Items(NUMBER), "datasets": Items(self)}
        self._of_kind = {"GPTDataset": Entries(file), "BlendedDataset": Entries(blend)}

    def check(self, value: Any) -> None:
        """See `Shape.check`."""
        super().check(value)
        kind = value.get("kind", "none")
        if not isinstance(kind, str):
            raise MisfitError("is no text", "kind")
        self._of_kind.get(kind, OBJECT).check(value)


def _choices(field: str) -> OneOf:
    return OneOf(*all_flags()[field].info.choices)


CONFIG_FILE = Entries({}, {flag.section: _Section(flag.section) for flag in all_flags().values()})
LAYOUT = Named(counts(1))
UNIT = OneOf("iterations", "samples", "tokens")
SCHEDULE = Entries(
    {
        "learning_rate": Entries(
            {
                "unit": UNIT,
                "style": _choices("lr_decay_style"),
                **dict.fromkeys(("peak", "minimum", "initial", "warmup", "wsd_length"), NUMBER),
                "length": Nullable(POSITIVE),
                "wsd_style": _choices("lr_wsd_decay_style"),
            },
            closed=True,
        ),
        "weight_decay": Entries(
            {
                "unit": UNIT,
                "style": _choices("weight_decay_incr_style"),
                "start": NUMBER,
                "end": NUMBER,
                "length": Nullable(POSITIVE),
            },
            closed=True,
        ),
    }
)
ORDER = Entries({"start": COUNT, "num_samples": COUNT, "samples": _Samples(), "tokenizer": OBJECT}, closed=True)
RUN = Entries(
    {
        "config": Both(CONFIG_FILE, Entries({"training": Entries({"precision": _choices("precision")})})),
        "layout": LAYOUT,
        "schedule": SCHEDULE,
        "order": ORDER,
        "software": Named(TEXT),
    }
)
"""What the numbers of a run's steps depend on."""

SCALER = Entries(
    {}, {"cur_scale": POSITIVE, **dict.fromkeys(("cur_iter", "last_overflow_iter", "cur_hysteresis"), counts(-1))}
)
STATE_FILE = Entries(
    {
        "counters": Entries(dict.fromkeys(COUNTERS, COUNT), closed=True),
        "layout": LAYOUT,
        "engine": Entries(
            {},
            {
                "optimizer": Entries({"type": TEXT, "step": COUNT}, {"kinds": Items(TEXT)}),
                "loss_scaler": Nullable(SCALER),
            },
        ),
    },
    {
        "training": Entries(
            {"run": RUN, "vocab_size": counts(1)},
            {"next_samples": Entries({"samples": counts(1), "loss_sum": BITS, "tokens": COUNT})},
        )
    },
)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says besides its tensors.

    Attributes:
        state: counters, layout, the engine's numbers.
        config: the sections of the run that saved it.
    """

    state: dict[str, Any]
    config: dict[str, Any]


def read_checkpoint(path: Path) -> Loaded:
    """Read the JSON files of a checkpoint that was found whole.

    Raises:
        CheckpointError: names the file, and the entry in it that is not what it must be.
    """
    return Loaded(state=read_json(path / STATE, STATE_FILE), config=read_json(path / CONFIG, CONFIG_FILE))


def read_run_config(path: Path) -> RunConfig:
    """Read the sections of the run that saved a checkpoint, for a model of its own.

    Raises:
        CheckpointError: names the file, and the fields of the model that are missing or illegal.
    """
    file = path / CONFIG
    try:
        config = RunConfig.from_json(read_json(file, CONFIG_FILE))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {' '.join(error.messages)}") from error
    if broken := list(broken_model_rules(config.model)):
        raise CheckpointError(f"{file}: {' '.join(broken)}")
    return config
