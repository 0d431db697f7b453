#!/usr/bin/env python3
"""Does a run beat word frequencies? Compares its validation loss with a unigram model's on the same tokens.

    python tools/unigram_loss.py --load quickstart/checkpoints

A unigram model knows how often each token occurs and nothing of its context. Here it counts the tokens of the run's
training documents, plus one for each id of the vocabulary, and is asked about exactly the tokens of the run's
evaluations. A model whose loss is not lower has learned no context. Exit code: 0 when the run is better, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.state_file import read_run_config
from megatron.config.errors import UserError
from megatron.config.run import RunConfig
from megatron.data.datasets import build_datasets
from megatron.data.indexed import IndexedDataset
from megatron.data.split import parse_split, split_documents
from megatron.data.tokenizer.build import build_tokenizer
from megatron.training.control import Control


class ComparisonError(UserError, ValueError):
    """The run's loss and a unigram model's cannot be compared."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and print both losses with their difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder of the run's checkpoints")
    parser.add_argument(
        "--metrics-file", type=Path, metavar="FILE", help="the run's metrics (default: metrics.jsonl in --load)"
    )
    arguments = parser.parse_args(argv)
    try:
        return compare(arguments.load, arguments.metrics_file or arguments.load / "metrics.jsonl")
    except UserError as error:
        print(f"unigram_loss: error: {error}", file=sys.stderr)
        return 2


def compare(checkpoints: Path, metrics_file: Path) -> int:
    """Print the run's last validation loss beside the unigram model's; returns the exit code."""
    config = read_config(checkpoints)
    loss, num_tokens, iteration = read_validation_loss(metrics_file)
    tokens = validation_tokens(config)
    if len(tokens) != num_tokens:
        raise ComparisonError(
            f"the run's evaluation counted {num_tokens} tokens and its flags give {len(tokens)}: compare a run whose "
            "flags did not change after it, and that leaves no token out of the loss (--eod-mask-loss)."
        )
    unigram = unigram_loss(training_counts(config), tokens)
    print(f"validation loss at iteration {iteration}, over the same {num_tokens} tokens, in nats a token:")
    print(f"  unigram model  {unigram:7.4f}   (perplexity {np.exp(unigram):8.1f})")
    print(f"  this model     {loss:7.4f}   (perplexity {np.exp(loss):8.1f})")
    if loss >= unigram:
        print(f"the run does NOT beat token frequencies: it is {loss - unigram:.4f} nats a token worse")
        return 1
    print(f"the run beats token frequencies by {unigram - loss:.4f} nats a token")
    return 0


def unigram_loss(counts: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> float:
    """Mean negative log probability of `tokens`, in nats, under frequencies with one added to each count."""
    smoothed = counts + 1
    return float(-np.log(smoothed[tokens] / smoothed.sum()).mean())


def read_config(checkpoints: Path) -> RunConfig:
    """Read the sections of the newest checkpoint.

    Raises:
        ComparisonError: there is none.
    """
    path = find_checkpoint(checkpoints, Control.alone(), lambda text: print(text, file=sys.stderr))
    if path is None:
        raise ComparisonError(f"--load {checkpoints} holds no checkpoint: name a run's --save folder.")
    return read_run_config(path)


def read_validation_loss(metrics_file: Path) -> tuple[float, int, int]:
    """Read the loss, the number of tokens and the iteration of the last evaluation on the validation set.

    Raises:
        ComparisonError: the file is missing, or holds no such evaluation.
    """
    if not metrics_file.is_file():
        raise ComparisonError(f"--metrics-file {metrics_file} does not exist: name the JSONL file of the run.")
    last = None
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
        if record.get("kind") == "evaluation" and record.get("split") == "validation":
            last = record
    if last is None or last["lm_loss"] is None:
        raise ComparisonError(f"{metrics_file} holds no validation loss: train with --eval-interval and --eval-iters.")
    return last["lm_loss"], last["tokens"], last["iteration"]


def validation_tokens(config: RunConfig) -> npt.NDArray[np.int64]:
    """All tokens that an evaluation of the run predicts, [n]."""
    num_samples = config.training.eval_iters * config.training.global_batch_size
    datasets = build_datasets(
        config.data, num_train=0, num_valid=num_samples, num_test=0, seed=config.training.seed, who="unigram_loss"
    )
    if datasets.valid is None:
        raise ComparisonError("the run has no validation set: give it a share in --split.")
    samples = datasets.valid
    return np.concatenate([samples[i][1:] for i in range(num_samples)])


def training_counts(config: RunConfig) -> npt.NDArray[np.int64]:
    """How often each id of the vocabulary occurs in the run's training documents, [vocabulary].

    Raises:
        ComparisonError: the run blends several files.
    """
    if len(config.data.data_path) != 1:
        raise ComparisonError("only a run with one --data-path, split by --split, can be compared.")
    indexed = IndexedDataset(config.data.data_path[0])
    documents = split_documents(parse_split(config.data.split), len(indexed))[0]
    counts = np.zeros(build_tokenizer(config.data).vocab_size, dtype=np.int64)
    for document in documents:
        counts += np.bincount(indexed[document], minlength=len(counts))
    return counts


if __name__ == "__main__":
    sys.exit(main())
