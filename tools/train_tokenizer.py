#!/usr/bin/env python3
"""Trains a SentencePiece tokenizer on text files, in seconds.

    python tools/train_tokenizer.py --input corpus.jsonl --output tokenizer.model --vocab-size 8000

Inputs are those of preprocess_data.py: JSON lines, text or Parquet, also compressed; files, folders or patterns. The
same inputs give the same file. Decoding gives every text back exactly (spaces, newlines, rare characters included).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron.config.errors import UserError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders, or quoted patterns")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=8000, help="number of pieces (default: 8000)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="kind of model (default: bpe)")
    parser.add_argument(
        "--json-key", default="text", help="JSON member or Parquet column that holds text (default: text)"
    )
    parser.add_argument(
        "--sample-megabytes", type=float, default=16, help="learn from about so much, evenly spread (default: 16)"
    )
    arguments = parser.parse_args(argv)
    if arguments.sample_megabytes <= 0:
        parser.error(f"--sample-megabytes {arguments.sample_megabytes} is too small: it is more than 0")
    return arguments


def texts_of(inputs: Sequence[Path], key: str) -> Iterator[str]:
    """Yield the texts of all inputs; what is malformed is passed over."""
    from megatron.data.preprocess.documents import Document, Piece, PieceReader, ReadingRules

    rules = ReadingRules(keys=(key,), columns=(key,))
    for path in inputs:
        for document in PieceReader(Piece(path=str(path)), rules):
            if isinstance(document, Document):
                yield document.texts[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    arguments = parse_arguments(argv)
    from megatron.data.preprocess.inputs import find_inputs
    from megatron.data.tokenizer.train import train_sentencepiece

    started = time.monotonic()
    try:
        inputs = find_inputs(arguments.input)
        megabytes = sum(path.stat().st_size for path in inputs) / 1e6
        train_sentencepiece(
            texts_of(inputs, arguments.json_key),
            arguments.output,
            vocab_size=arguments.vocab_size,
            model_type=arguments.model_type,
            keep_one_in=max(round(megabytes / arguments.sample_megabytes), 1),
        )
    except (UserError, OSError) as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.output}: {arguments.vocab_size} {arguments.model_type} pieces learned from {megabytes:.1f} MB in "
        f"{time.monotonic() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
