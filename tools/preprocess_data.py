#!/usr/bin/env python3
r"""Turns text into token files: JSON lines, text and Parquet into a .bin/.idx pair for each key.

    python tools/preprocess_data.py --input corpus.jsonl.gz --output-prefix data/corpus --append-eod --workers 8 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model

writes data/corpus_text_document.bin, .idx and .meta.json; give `data/corpus_text_document` as --data-path. The kind of
an input is known by its ending (.jsonl .json .ndjson, .parquet, else text), also under .gz and .zst. A run that was
killed goes on where it was when the same command is given again; the output is the same for any number of workers.
Malformed lines are counted and listed, with file and line, in <output-prefix>.errors.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron.config.errors import UserError
from megatron.data.tokenizer.flags import add_tokenizer_flags, tokenizer_config

if TYPE_CHECKING:
    from megatron.data.preprocess.run import PreprocessSettings, PreprocessSummary


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reading = parser.add_argument_group("input")
    reading.add_argument(
        "--input", nargs="+", required=True, help="files, folders, or quoted patterns (`**` for depth)"
    )
    reading.add_argument("--json-keys", nargs="+", default=["text"], help="members that hold text (default: text)")
    reading.add_argument("--parquet-column", help="column that holds text (default: the name given as --json-keys)")
    reading.add_argument(
        "--text-document",
        choices=("file", "line", "blank-line"),
        default="file",
        help="one document of a text file: all of it, each line, or what stands between blank lines (default: file)",
    )
    reading.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="skip",
        help="what to do at a malformed line: count and list it, or stop with its file and line (default: skip)",
    )
    add_tokenizer_flags(parser)
    writing = parser.add_argument_group("output")
    writing.add_argument("--output-prefix", required=True, help="path without the ending; `_<key>_document` is added")
    writing.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    writing.add_argument(
        "--overwrite", action="store_true", help="replace an output or an unfinished run that is there"
    )
    writing.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    writing.add_argument(
        "--shard-megabytes", type=float, help="input that is one unit of work (default: a 256th of all, 1 to 64 MiB)"
    )
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} is too small: at least one process does the work")
    if arguments.shard_megabytes is not None and arguments.shard_megabytes <= 0:
        parser.error(f"--shard-megabytes {arguments.shard_megabytes} is too small: it is more than 0")
    if arguments.parquet_column and len(arguments.json_keys) > 1:
        parser.error(
            "--parquet-column names one column, and --json-keys several: leave it out, columns are named as keys"
        )
    return arguments


def build_settings(arguments: argparse.Namespace) -> PreprocessSettings:
    """Make the job's settings out of the command line."""
    from megatron.data.preprocess.documents import ReadingRules
    from megatron.data.preprocess.run import PreprocessSettings

    keys = tuple(dict.fromkeys(arguments.json_keys))
    rules = ReadingRules(
        keys=keys,
        text_document=arguments.text_document,
        columns=(arguments.parquet_column,) if arguments.parquet_column else keys,
    )
    megabytes = arguments.shard_megabytes
    return PreprocessSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer=tokenizer_config(arguments),
        rules=rules,
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        stop_on_error=arguments.on_error == "stop",
        overwrite=arguments.overwrite,
        shard_bytes=None if megabytes is None else max(int(megabytes * (1 << 20)), 1),
    )


def print_summary(summary: PreprocessSummary, seconds: float) -> None:
    """Say what was made and what was passed over."""
    for prefix, meta in summary.outputs.items():
        print(f"{prefix}: {meta.documents} documents, {meta.tokens} {meta.dtype} tokens")
    print(f"{summary.input_bytes / 1e6:.1f} MB of input in {seconds:.1f} s")
    if summary.empty:
        print(f"{summary.empty} empty texts left out")
    if summary.errors_file:
        print(f"{summary.malformed} malformed lines left out, all of them in {summary.errors_file}; the first:")
        for error in summary.first_errors:
            print(f"  {error}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    arguments = parse_arguments(argv)
    from megatron.data.preprocess.run import preprocess

    started = time.monotonic()
    try:
        summary = preprocess(build_settings(arguments))
    except (UserError, OSError) as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print_summary(summary, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
