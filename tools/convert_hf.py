"""Convert models of Hugging Face into checkpoints and back: `python tools/convert_hf.py import --hf DIR --save DIR`.

Both ways need neither a GPU nor the memory of the whole model. Afterwards both models are run on the same random tokens
and their logits compared, which does need that memory; --no-check leaves it out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.errors import UserError, tell

if TYPE_CHECKING:
    from megatron.config.sections import RunConfig

WRONG = 1
"""Exit code of a conversion whose logits differ."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code: 1 when the logits differ, 2 when nothing could be converted."""
    arguments = parse(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        tell(error, rank=0)
        return 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(required=True, metavar="import|export")
    inward = ways.add_parser("import", help="a folder of Hugging Face becomes a checkpoint that any layout loads")
    inward.set_defaults(run=run_import)
    inward.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    inward.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder of checkpoints to make")
    inward.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="of runs that start from it (default: that of the files)"
    )
    inward.add_argument(
        "--make-vocab-size-divisible-by", type=int, metavar="N", help="as in training (default: 128, as there)"
    )
    outward = ways.add_parser("export", help="a checkpoint becomes a folder that transformers loads")
    outward.set_defaults(run=run_export)
    outward.add_argument(
        "--load", type=Path, required=True, metavar="DIR", help="folder of checkpoints, or one of them"
    )
    outward.add_argument("--load-tag", metavar="TAG", help="which one, as step_0000100 (default: the newest)")
    outward.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder to make")
    outward.add_argument(
        "--model-type",
        metavar="TYPE",
        help="family to write (default: that of the tokenizer's folder, else the first that has all the model has)",
    )
    outward.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (default: the run's --precision)"
    )
    outward.add_argument(
        "--max-shard-size", type=byte_count, default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)"
    )
    outward.add_argument(
        "--tokenizer-model", metavar="FILE", help="tokenizer.json or its folder, instead of the run's tokenizer"
    )
    for way in (inward, outward):
        way.add_argument("--no-check", action="store_true", help="do not compare the logits of both models")
    return parser.parse_args(argv)


def byte_count(text: str) -> int:
    """Read `500MB` or `2GiB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def run_import(arguments: argparse.Namespace) -> int:
    """Make a checkpoint, and say how to start from it."""
    from megatron.convert.hugging_face.check import require_transformers
    from megatron.convert.hugging_face.command_line import model_words, shell_line, tokenizer_words
    from megatron.convert.hugging_face.importing import import_model

    if not arguments.no_check:
        require_transformers()
    made = import_model(
        arguments.hf,
        arguments.save,
        precision=arguments.precision,
        divisor=arguments.make_vocab_size_divisible_by,
    )
    print(f"{made.path}: {made.num_parameters:,} parameters of {arguments.hf}")
    start = ["python", "pretrain_gpt.py", "--load", str(arguments.save), "--finetune", "--precision", made.precision]
    words = [*model_words(made.model), *tokenizer_words(made.data)]
    print("start from it with these flags, and those of the training (--lr, --train-iters, --data-path, ...):\n")
    print(f"{shell_line([*start, *words])}\n")
    print(f"or with --load {arguments.save} --finetune --use-checkpoint-args instead of the model's flags")
    return check(arguments, arguments.hf, made.path, made.model, made.num_parameters, "fp32")


def run_export(arguments: argparse.Namespace) -> int:
    """Make a folder of Hugging Face."""
    import dataclasses

    from megatron.checkpoint.fragments import open_tensors
    from megatron.convert.hugging_face.check import require_transformers
    from megatron.convert.hugging_face.exporting import export_model

    if not arguments.no_check:
        require_transformers()
    path, config = open_checkpoint(arguments.load, arguments.load_tag)
    data, precision = config.data, arguments.dtype or config.training.precision
    if arguments.tokenizer_model is not None:
        changes: dict[str, Any] = {"vocab_file": None, "merge_file": None, "tokenizer_model": arguments.tokenizer_model}
        data = dataclasses.replace(data, tokenizer_type="HuggingFaceTokenizer", **changes)
    tensors = open_tensors(path)
    made = export_model(
        tensors,
        arguments.hf,
        model=config.model,
        data=data,
        precision=precision,
        model_type=arguments.model_type,
        max_shard_bytes=arguments.max_shard_size,
    )
    files = ", ".join(made.tokenizer) or "none: the run's tokenizer has no files that transformers reads"
    print(f"{made.path}: {made.model_type}, {made.num_parameters:,} parameters of {path} in {precision}")
    print(f"tokenizer: {files}")
    return check(arguments, arguments.hf, path, config.model, made.num_parameters, precision)


def open_checkpoint(root: Path, tag: str | None) -> tuple[Path, RunConfig]:
    """Find the checkpoint to use, verify it, and read the config of its run."""
    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.state_file import read_run_config
    from megatron.training.control import Control

    path = find_checkpoint(root, Control.alone(), lambda text: print(text, file=sys.stderr), tag)
    if path is None:
        raise UserError(
            f"--load {root} holds no checkpoint: give a folder that --save named, or one of its checkpoints"
        )
    return path, read_run_config(path)


def check(arguments: argparse.Namespace, folder: Path, path: Path, model: Any, parameters: int, precision: str) -> int:
    """Compare the logits of both sides and print the difference; returns the exit code."""
    if arguments.no_check:
        return 0
    from megatron.checkpoint.fragments import open_tensors
    from megatron.convert.hugging_face.check import compare_logits, gib_of_check
    from megatron.convert.hugging_face.exporting import DTYPES

    gib = gib_of_check(parameters)
    print(f"comparing logits in fp32 (takes {gib:.2f} GiB of memory; --no-check leaves it out)", flush=True)
    found = compare_logits(folder, open_tensors(path), model, DTYPES[precision])
    print(f"logits {'agree' if found.agrees else 'DIFFER'}: {found}")
    return 0 if found.agrees else WRONG


if __name__ == "__main__":
    sys.exit(main())
