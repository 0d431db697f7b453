"""Import a checkpoint of Megatron-LM or Megatron-DeepSpeed: `import_megatron.py FOLDER --save OUT`.

Weights, fp32 copies and Adam's moments of all ranks become one checkpoint that any layout loads; nothing that the files
hold is run. docs/older_checkpoints.md says what is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.config.errors import UserError, tell


def main(argv: Sequence[str] | None = None) -> int:
    """Import; returns the exit code."""
    arguments = parse(argv)
    from megatron.convert.older.importing import ImportOptions, import_checkpoint  # torch, after --help

    options = ImportOptions(
        vocab_size=arguments.vocab_size,
        weights_only=arguments.weights_only,
        replicas=arguments.replicas,
        admitted=tuple(arguments.admit_class),
        accept_rotary=arguments.accept_rotary,
    )
    try:
        imported = import_checkpoint(arguments.folder, arguments.save, options)
    except UserError as error:
        tell(error, rank=0)
        return 2
    for note in imported.notes:
        print(f"Note: {note}", file=sys.stderr)
    state = "weights and Adam's state" if imported.with_optimizer else "weights"
    print(
        f"{imported.folder}: {state} of iteration {imported.iteration}, {imported.consumed_samples} samples.\n"
        f"To go on from it, with the data, tokenizer and schedule of the run:\n{imported.command}"
    )
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of one iteration, or what the run had as --save")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder for --load; made if missing")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="ids of the tokenizer, if not recorded there")
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer's state")
    parser.add_argument(
        "--replicas",
        choices=("equal", "first", "mean"),
        default="equal",
        help="where tensor ranks differ about norms or biases that they share: refuse (equal), or take either "
        "(default: equal)",
    )
    parser.add_argument(
        "--admit-class",
        action="append",
        default=[],
        metavar="NAME",
        help="a further class that its files may name; its objects are read as inert records, none of its code runs",
    )
    parser.add_argument(
        "--accept-rotary",
        action="store_true",
        help="import rotary positions of a Megatron-DeepSpeed that may have rotated by cosines",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
