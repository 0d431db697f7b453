"""Say what a checkpoint holds: `python tools/inspect_checkpoint.py FOLDER`, of one checkpoint or of a `--save` folder.

Prints the checkpoints of the folder, and of one of them (the one that would be resumed, or --tag): step, layout, size,
every logical tensor with its shape, kinds and shards, the files, and with --config the flags of the run. --verify reads
every file and names each that is damaged. No file is trusted: nothing in it is run, and names that lead elsewhere are
refused. Exit code 0: as it should be; 1: damaged; 2: there is none.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.errors import UserError, tell

if TYPE_CHECKING:
    from megatron.checkpoint.files import Digest
    from megatron.checkpoint.fragments import LogicalTensors

GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect; returns the exit code."""
    arguments = parse(argv)
    from megatron.checkpoint.errors import CheckpointError

    try:
        path = choose(arguments.folder, arguments.tag)
    except UserError as error:
        tell(error, rank=0)
        return 2
    try:
        problems = show(path, with_config=arguments.config)
        problems = verify(path) if arguments.verify else problems
    except CheckpointError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"DAMAGED: {problem}")
    return 1 if problems else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint, or a folder of checkpoints")
    parser.add_argument("--tag", help="the checkpoint of the folder (default: the one that would be resumed)")
    parser.add_argument("--config", action="store_true", help="print the flags of the run that saved it")
    parser.add_argument("--verify", action="store_true", help="hold every file against its SHA-256")
    return parser.parse_args(argv)


def choose(root: Path, tag: str | None) -> Path:
    """Find the checkpoint that is meant, and list those that are there.

    Raises:
        CheckpointError: there is none.
    """
    from megatron.checkpoint.errors import CheckpointError
    from megatron.checkpoint.find import candidates
    from megatron.checkpoint.names import folder_of

    found = candidates(root, warn=lambda text: print(f"note: {text}"))
    if not found:
        raise CheckpointError(f"{root} holds no checkpoint: name a folder of --save, or a checkpoint in it")
    if found != [root]:
        print(f"{root}: {', '.join(sorted(path.name for path in found))}")
    return found[0] if tag is None else folder_of(root, tag)


def show(path: Path, *, with_config: bool) -> list[str]:
    """Print what a checkpoint says of itself; returns what is wrong without reading any tensor.

    Raises:
        CheckpointError: it cannot be read at all.
    """
    from megatron.checkpoint.fragments import open_tensors
    from megatron.checkpoint.manifest import read_manifest, unlisted, wrong_sizes
    from megatron.checkpoint.state_file import read_checkpoint

    files = read_manifest(path)
    loaded, tensors = read_checkpoint(path), open_tensors(path)
    counters, layout = loaded.state.get("counters", {}), loaded.state.get("layout", {})
    print(f"{path}: {sum(digest.bytes for digest in files.values()) / GB:.3f} GB in {len(files)} files")
    print("  " + ", ".join(f"{name} {value}" for name, value in counters.items()))
    print("  layout: " + (", ".join(f"{name} {size}" for name, size in layout.items()) or "written by one process"))
    for line in describe_tensors(tensors):
        print(line)
    for line in describe_files(files):
        print(line)
    if with_config:
        print(json.dumps(loaded.config, indent=1))
    for name in unlisted(path, files):
        print(f"note: {name} is not one of its files and is not read")
    tensors.check()
    return [f"{path / problem}" for problem in wrong_sizes(path, files)]


def describe_tensors(tensors: LogicalTensors) -> Iterator[str]:
    """Say of each logical tensor its shape, what of it is kept and in how many shards, as a table."""
    rows = [("tensor", "shape", "shards", "kinds")]
    entries = 0
    for name in tensors.names:
        entries += math.prod(tensors.shape(name))
        shards = str(tensors.sharding(name).num_shards)
        if tensors.sharding(name).num_shards > 1:
            shards += f" along {tensors.sharding(name).dim}"
        kinds = ", ".join(
            f"{kind} {str(tensors.dtype(name, kind)).removeprefix('torch.')} in {len(tensors.fragments(name, kind))}"
            for kind in tensors.kinds(name)
        )
        shape = "x".join(map(str, tensors.shape(name))) or "scalar"
        padding = f" ({tensors.padding(name)} padding)" if tensors.padding(name) else ""
        rows.append((name, shape + padding, shards, kinds))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    yield f"  {len(tensors.names)} logical tensors, {entries:,} entries; kinds with their dtype and number of fragments"
    for row in rows:
        yield "  " + "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])


def describe_files(files: dict[str, Digest]) -> Iterator[str]:
    """Say how large each file is."""
    width = max(map(len, files))
    for name in sorted(files):
        yield f"  {name.ljust(width)}  {files[name].bytes:>15,} bytes  {files[name].sha256[:16]}"


def verify(path: Path) -> list[str]:
    """Read every file; returns which are damaged."""
    from megatron.checkpoint.manifest import read_manifest, wrong_bytes

    files, started = read_manifest(path), time.monotonic()
    problems = [f"{path / problem}" for problem in wrong_bytes(path, files, sorted(files))]
    seconds = time.monotonic() - started
    total = sum(digest.bytes for digest in files.values()) / GB
    whole = len(files) - len(problems)
    print(f"verified: {whole} of {len(files)} files whole, {total:.3f} GB in {seconds:.2f} s")
    return problems


if __name__ == "__main__":
    sys.exit(main())
