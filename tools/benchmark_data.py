#!/usr/bin/env python3
"""Measures the data path: building the indices of many documents, opening them again, and loading batches.

    python tools/benchmark_data.py --documents 10000000

writes an index of random document lengths (its tokens are a file of zeros that takes no space where the file system
has sparse files) to a temporary folder, and prints one line a measurement. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

import numpy as np

from megatron.data.blend import build_blend_indices
from megatron.data.gpt_dataset import GPTDataset
from megatron.data.index_cache import IndexCache
from megatron.data.index_file import OFFSET_TYPE, SIZE_TYPE, IndexHeader
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import build_loader
from megatron.data.meta import index_path, tokens_path

TOKEN_TYPE = np.dtype("<u2")
SEED = 1234
BLEND = (0.4, 0.3, 0.15, 0.1, 0.05)
Result = TypeVar("Result")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents of the file")
    parser.add_argument("--mean-length", type=int, default=500, help="mean tokens of a document")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--epochs", type=float, default=1.0, help="times the samples go through the file")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="samples of a batch")
    parser.add_argument("--batches", type=int, default=200, help="batches to load")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of loader processes to try")
    parser.add_argument("--folder", help="folder for the temporary files (default: the system's)")
    return parser.parse_args(arguments)


def write_file(prefix: Path, documents: int, mean_length: int) -> int:
    """Write a pair of `documents` exponentially distributed lengths and zero tokens; returns the number of tokens."""
    random = np.random.default_rng(SEED)
    sizes = np.maximum(random.exponential(mean_length, documents), 1).astype(SIZE_TYPE)
    ends = np.cumsum(sizes, dtype=OFFSET_TYPE)
    header = IndexHeader(token_type=TOKEN_TYPE, num_sequences=documents, document_index_length=documents + 1)
    with index_path(prefix).open("wb") as file:
        file.write(header.pack())
        for part in (sizes, (ends - sizes) * TOKEN_TYPE.itemsize, np.arange(documents + 1, dtype=OFFSET_TYPE)):
            file.write(part.tobytes())
    with tokens_path(prefix).open("wb") as file:
        file.truncate(int(ends[-1]) * TOKEN_TYPE.itemsize)
    return int(ends[-1])


def measure(what: str, function: Callable[[], Result]) -> Result:
    """Call a function and print what it took: on a busy machine the processor's seconds say more than the clock's."""
    clock, processor = time.perf_counter(), time.process_time()
    result = function()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    show(what, f"{clock:.2f} s, of processor {processor:.2f} s")
    return result


def megabytes(folder: Path) -> float:
    """Add up the files below a folder, in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def samples_per_second(dataset: GPTDataset, options: argparse.Namespace, num_workers: int) -> float:
    """Load the same batches as every call; the first of them, for which workers start, is not timed."""
    loader = build_loader(
        dataset, micro_batch_size=options.micro_batch_size, data_rank=0, data_size=1, num_workers=num_workers
    )
    next(loader)
    start = time.perf_counter()
    num_samples = sum(len(batch.tokens) for batch in islice(loader, options.batches))
    return num_samples / (time.perf_counter() - start)


def show(what: str, value: str) -> None:
    """Print one line of the table."""
    print(f"{what:<44}{value:>36}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefix, cache = Path(folder, "text"), IndexCache(Path(folder, "cache"))
        num_tokens = write_file(prefix, options.documents, options.mean_length)
        num_samples = max(1, int(options.epochs * (num_tokens - 1) / options.seq_length))
        show("documents, tokens", f"{options.documents:,}, {num_tokens:,}")
        show("samples of --seq-length tokens", f"{num_samples:,} of {options.seq_length}")
        indexed = measure("open and check the pair", lambda: IndexedDataset(prefix))

        def open_dataset() -> GPTDataset:
            documents = range(len(indexed))
            return GPTDataset(
                indexed, documents, seq_length=options.seq_length, num_samples=num_samples, seed=SEED, cache=cache
            )

        dataset = measure("build and save the indices", open_dataset)
        show("indices on disk", f"{megabytes(cache.folder):.0f} MB")
        show("peak memory of this process so far", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
        measure("load the indices again", open_dataset)
        show("loader, tokens not yet in memory", f"{samples_per_second(dataset, options, 0):,.0f} samples/s")
        for num_workers in options.workers:
            rate = samples_per_second(dataset, options, num_workers)
            tokens_rate = rate * options.seq_length / 1e6
            show(f"loader, {num_workers} workers", f"{rate:,.0f} samples/s, {tokens_rate:,.1f} M tokens/s")
        measure("order of 10 million samples of a blend", lambda: build_blend_indices(BLEND, 10_000_000))


if __name__ == "__main__":
    main()
