"""The tokenizer's flags for a tool's command line: the same names and help as in training."""

from __future__ import annotations

import argparse
import dataclasses

from megatron.config.data import DataConfig

TOKENIZER_FIELDS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--tokenizer-type` and its companions to a tool's parser."""
    group = parser.add_argument_group("tokenizer")
    for field in dataclasses.fields(DataConfig):
        if field.name not in TOKENIZER_FIELDS:
            continue
        info = field.metadata["flag"]
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            choices=info.choices or None,
            type=int if field.name == "vocab_size" else str,
            required=field.name == "tokenizer_type",
            help=info.help,
        )


def tokenizer_config(arguments: argparse.Namespace) -> DataConfig:
    """Make the section that `build_tokenizer` takes out of a tool's arguments."""
    return DataConfig(**{name: getattr(arguments, name) for name in TOKENIZER_FIELDS})
