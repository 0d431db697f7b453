"""Continue prompts with a trained model: `python tools/generate_text.py --load CHECKPOINTS --prompt "Once upon"`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.errors import UserError, tell

if TYPE_CHECKING:
    from megatron.config.data import DataConfig
    from megatron.config.sections import RunConfig
    from megatron.model.gpt import GPT

TOKENIZER_FLAGS = ("tokenizer_model", "vocab_file", "merge_file")


def main(argv: Sequence[str] | None = None) -> int:
    """Generate; returns the exit code."""
    arguments = parse(argv)
    try:
        for text in continuations(arguments):
            print(text, flush=True)
    except UserError as error:
        tell(error, rank=0)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder of checkpoints, or one of them")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", help="a text to continue; may be repeated (default: from stdin)")
    prompts.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text to continue on each line")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to append, at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 is greedy (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that reach p (default: all)")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    for name in TOKENIZER_FLAGS:
        spelling = "--" + name.replace("_", "-")
        parser.add_argument(spelling, metavar="FILE", help="instead of the path that the run was trained with")
    return parser.parse_args(argv)


def continuations(arguments: argparse.Namespace) -> list[str]:
    """Give each prompt with its continuation.

    Raises:
        UserError: the checkpoint or the tokenizer's files are missing, or a value is out of range.
    """
    texts = read_prompts(arguments)

    from megatron.data.tokenizer.build import build_tokenizer
    from megatron.model.generation import generate

    path, config = open_checkpoint(arguments.load)
    tokenizer = build_tokenizer(with_tokenizer_files(config.data, arguments))
    model = load_model(path, config, tokenizer.vocab_size, arguments.device)
    # A text without tokens is continued from where a document begins.
    start = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
    prompts = [tokenizer.encode(text) or start for text in texts]
    new_tokens = generate(
        model,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        greedy=arguments.greedy,
        eod_id=tokenizer.eod_id,
        seed=arguments.seed,
    )
    ended = [[token for token in tokens if token != tokenizer.eod_id] for tokens in new_tokens]
    known = [[token for token in prompt if token != tokenizer.eod_id] for prompt in prompts]
    return [tokenizer.decode(prompt + tokens) for prompt, tokens in zip(known, ended, strict=True)]


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Take the prompts from the command line, a file or stdin: all of stdin is one prompt."""
    if arguments.prompt is not None:
        return list(arguments.prompt)
    if arguments.prompt_file is None:
        return [sys.stdin.read().rstrip("\n")]
    try:
        text = arguments.prompt_file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-file {arguments.prompt_file} cannot be read: {error}") from error
    return text.splitlines()


def open_checkpoint(root: Path) -> tuple[Path, RunConfig]:
    """Find the checkpoint to use, verify it, and read the config of its run."""
    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.state_file import read_run_config
    from megatron.training.control import Control

    path = find_checkpoint(root, Control.alone(), warn=lambda text: print(text, file=sys.stderr))
    if path is None:
        raise UserError(
            f"--load {root} holds no checkpoint: give a folder that --save named, or one of its checkpoints"
        )
    return path, read_run_config(path)


def with_tokenizer_files(data: DataConfig, arguments: argparse.Namespace) -> DataConfig:
    """Put the paths of the command line in the place of those of the run."""
    given = {name: getattr(arguments, name) for name in TOKENIZER_FLAGS}
    return dataclasses.replace(data, **{name: path for name, path in given.items() if path is not None})


def load_model(path: Path, config: RunConfig, vocab_size: int, device_name: str | None) -> GPT:
    """Build the model of a run with the weights of a checkpoint."""
    import torch

    from megatron.engine.launch import quiet_stdout

    with quiet_stdout():  # DeepSpeed prints when it is imported
        from megatron.training.build_engine import DTYPES
    from megatron.checkpoint.fragments import open_tensors
    from megatron.checkpoint.weights import load_weights
    from megatron.kernels.attention.interface import AttentionRequest
    from megatron.kernels.attention.pick import pick_attention
    from megatron.model.gpt import GPT
    from megatron.parallel.groups import ParallelGroups
    from megatron.parallel.sharding import describe_sharding

    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[config.training.precision]
    request = AttentionRequest(
        head_size=config.model.kv_channels,
        dtype=dtype,
        device_type=device.type,
        gqa=config.model.num_key_value_heads != config.model.num_attention_heads,
        mask=True,
        cache=True,
        window=config.model.attention_window > 0,
        softcap=config.model.attention_softcap > 0,
    )
    attention, _ = pick_attention("auto", request)
    with torch.device("meta"):
        model = GPT(config.model, vocab_size=vocab_size, groups=ParallelGroups.alone(), attention=attention)
    shardings = describe_sharding(model)
    model.to_empty(device=device).to(dtype)
    load_weights(model, open_tensors(path), shardings)
    return model


if __name__ == "__main__":
    sys.exit(main())
