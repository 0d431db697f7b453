#!/usr/bin/env python3
"""Real text that is on every machine that runs Python: the standard library's own sources and docstrings.

    python tools/collect_text.py --output text.jsonl

Writes one JSON object a line, `{"name": ..., "text": ...}`: each source file of the standard library (test suites and
generated tables left out), and the docstrings of the modules that have no source file because they are compiled. The
order depends on the names alone and is shuffled by their hash, so that a split by document gives every part the same
kinds of text. Needs the standard library only. About 11 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
INSTALLED_FOLDERS = frozenset({"site-packages", "dist-packages"})
TABLE_FOLDERS = frozenset({"encodings"})  # generated, and one much like the next: too easy to learn
LEFT_OUT = TEST_FOLDERS | INSTALLED_FOLDERS | TABLE_FOLDERS
SHORTEST_DOCUMENT = 100  # characters: empty `__init__.py` files teach nothing


def source_documents(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each source file below `library`, without the folders of `LEFT_OUT`.

    Files that do not decode as Python says they are encoded are passed over: a few exist to test just that.
    """
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if LEFT_OUT.intersection(name.parts):
            continue
        try:
            with tokenize.open(path) as file:
                yield name.as_posix(), file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue


def compiled_modules() -> Iterator[ModuleType]:
    """Yield the standard library's modules that are compiled into the interpreter or lie beside it as libraries."""
    extension_folder = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    extensions = {path.name.split(".")[0] for path in extension_folder.glob("*.so")}
    for name in sorted((extensions | set(sys.builtin_module_names)) & sys.stdlib_module_names):
        if "test" in name:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # some are deprecated; their docstrings are good
                module = importlib.import_module(name)
        except ImportError:  # its shared library is not on this machine (tkinter, dbm)
            continue
        yield module


def docstrings_of(module: ModuleType) -> str:
    """Return the docstrings of a module, its functions, and its classes with their methods, as plain text."""
    parts = [f"{module.__name__}\n\n{inspect.getdoc(module) or ''}"]
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or getattr(member, "__module__", None) not in (module.__name__, None):
            continue
        if inspect.isclass(member):
            methods = {key: value for key, value in vars(member).items() if not key.startswith("_")}
            named = [(name, member), *((f"{name}.{key}", methods[key]) for key in sorted(methods))]
        elif inspect.isbuiltin(member):
            named = [(name, member)]
        else:
            continue
        parts += [f"{label}\n{inspect.getdoc(item)}" for label, item in named if isinstance(item.__doc__, str)]
    return "\n\n".join(parts) + "\n"


def collect_documents() -> list[tuple[str, str]]:
    """Return all documents as (name, text), shuffled by the hash of their names."""
    documents = list(source_documents(Path(sysconfig.get_path("stdlib"))))
    documents += [(f"docstrings of {module.__name__}", docstrings_of(module)) for module in compiled_modules()]
    long_enough = (document for document in documents if len(document[1]) >= SHORTEST_DOCUMENT)
    return sorted(long_enough, key=lambda document: hashlib.sha256(document[0].encode()).digest())


def write_jsonl(documents: list[tuple[str, str]], output: Path) -> None:
    """Write the documents, one JSON object a line; the file appears complete or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"name": name, "text": text}) + "\n" for name, text in documents)
    os.replace(unfinished, output)


def main(argv: list[str] | None = None) -> int:
    """Collect, write, and tell how much it was."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    arguments = parser.parse_args(argv)
    documents = collect_documents()
    write_jsonl(documents, arguments.output)
    megabytes = sum(len(text.encode()) for _, text in documents) / 1e6
    print(f"{len(documents)} documents, {megabytes:.1f} MB of text: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
