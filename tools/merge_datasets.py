#!/usr/bin/env python3
"""Merges datasets of one tokenizer into one, documents in the order given.

    python tools/merge_datasets.py --input data/a_text_document data/b_text_document --output-prefix data/all

An input is the prefix of a .bin/.idx pair, or a folder for all pairs in it, by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron.config.errors import UserError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="prefixes of pairs, or folders")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the merged pair, no ending")
    parser.add_argument("--overwrite", action="store_true", help="replace a pair that is there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    arguments = parse_arguments(argv)
    from megatron.data.join import find_prefixes, merge_datasets

    try:
        prefixes = find_prefixes(arguments.input)
        meta = merge_datasets(prefixes, arguments.output_prefix, overwrite=arguments.overwrite)
    except (UserError, OSError) as error:
        print(f"merge_datasets: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.output_prefix}: {meta.documents} documents, {meta.tokens} {meta.dtype} tokens "
        f"of {len(prefixes)} datasets"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
