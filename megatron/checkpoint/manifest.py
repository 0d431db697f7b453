"""The manifest: which files a complete checkpoint has, with size and SHA-256, sealed so that it cannot rot unseen.

It is read before any other file is, and every file is held against it before it is parsed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import DIGEST, Digest, digest_of, read_json, write_json
from megatron.checkpoint.names import MANIFEST, check_name, size_of
from megatron.checkpoint.schema import COUNT, TEXT, Entries, Named, require

VERSION = 2
"""Of the files of a checkpoint; version 1 had DeepSpeed's."""

MANIFEST_FILE = Entries({"version": COUNT, "files": Named(DIGEST), "sha256": TEXT}, closed=True)

LARGEST_MANIFEST = 256 * 2**20
HASHING_THREADS = 4


def write_manifest(folder: Path, files: Mapping[str, Digest]) -> None:
    """Write the manifest of a folder and sync it."""
    write_json(folder / MANIFEST, _sealed({name: vars(files[name]) for name in sorted(files)}))


def read_manifest(folder: Path) -> dict[str, Digest]:
    """Read which files a checkpoint has.

    Raises:
        CheckpointError: there is no manifest, it is damaged, of another version, or names a file elsewhere.
    """
    path = folder / MANIFEST
    size = size_of(path)
    if size is None or size > LARGEST_MANIFEST:
        raise CheckpointError(f"{path} is {'missing' if size is None else 'no manifest'}: no complete checkpoint")
    manifest = read_json(path)
    if manifest.get("version") != VERSION or type(manifest["version"]) is not int:
        raise CheckpointError(
            f"{path} has version {str(manifest.get('version', 'none'))[:20]}, and this program reads version "
            f"{VERSION}: load it with the program that wrote it"
        )
    require(manifest, MANIFEST_FILE, path)
    files = manifest["files"]
    for name in files:
        check_name(name, path)
    if path.read_bytes() != (json.dumps(_sealed(files), indent=1) + "\n").encode():
        raise CheckpointError(f"{path} does not have its own SHA-256: it is damaged")
    return {name: Digest(**digest) for name, digest in files.items()}


def wrong_sizes(folder: Path, files: Mapping[str, Digest]) -> list[str]:
    """Say which files of a manifest are missing, or have another size."""
    sizes = {name: size_of(folder / name) for name in files}
    return [
        f"{name} has {'no' if size is None else size} bytes instead of {files[name].bytes}"
        for name, size in sizes.items()
        if size != files[name].bytes
    ]


def unlisted(folder: Path, files: Mapping[str, Digest]) -> list[str]:
    """Name what lies in the folder and is not in the manifest."""
    return sorted({entry.name for entry in folder.iterdir()} - set(files) - {MANIFEST})


def wrong_bytes(folder: Path, files: Mapping[str, Digest], names: Iterable[str]) -> list[str]:
    """Read the named files and say which are not those of the manifest."""

    def problem(name: str) -> str | None:
        try:
            if size_of(folder / name) is not None and digest_of(folder / name) == files[name]:
                return None
            return f"{name} does not have the size and SHA-256 of the manifest: the file is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error})"

    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return [found for found in threads.map(problem, names) if found is not None]


def share_of(files: Mapping[str, Digest], rank: int, size: int) -> list[str]:
    """Divide files over ranks so that each reads about as many bytes; returns the names that are the rank's."""
    load = [0] * size
    mine = []
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        lightest = load.index(min(load))
        load[lightest] += files[name].bytes + 1
        if lightest == rank:
            mine.append(name)
    return mine


def _sealed(files: Mapping[str, Any]) -> dict[str, Any]:
    content = {"version": VERSION, "files": dict(files)}
    return {**content, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
