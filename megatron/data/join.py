"""Joins `.bin/.idx` pairs into one, documents in the order of the pairs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError, DuplicateDataError, MissingDataError
from megatron.data.index_file import read_header
from megatron.data.indexed import IndexedDatasetWriter
from megatron.data.meta import DatasetMeta, TokenizerIdentity, index_path

Prefix = str | os.PathLike[str]


def join_pairs(
    output: Prefix,
    prefixes: Sequence[Prefix],
    dtype: npt.DTypeLike,
    *,
    tokenizer: TokenizerIdentity | None,
    made_by: Mapping[str, Any],
) -> DatasetMeta:
    """Write the documents of all pairs into one; it appears complete or not at all.

    Raises:
        DataError: a pair does not open, or has an id that `dtype` does not hold.
    """
    writer = IndexedDatasetWriter(output, dtype, tokenizer=tokenizer, made_by=made_by)
    try:
        for prefix in prefixes:
            writer.add_index(prefix)
        return writer.finish()
    finally:
        writer.abandon()


def merge_datasets(prefixes: Sequence[str], output: str, *, overwrite: bool = False) -> DatasetMeta:
    """Join datasets that one tokenizer made into one.

    Raises:
        DataError: they differ in token type or tokenizer, the output is one of them or is there already, or a pair
            does not open.
    """
    if os.path.realpath(output) in map(os.path.realpath, prefixes):
        raise DataError(f"--output-prefix {output} is one of the inputs: choose another.")
    if index_path(output).exists() and not overwrite:
        raise DuplicateDataError(f"{index_path(output)} is there already: replace it with --overwrite.")
    dtype = _common_token_type(prefixes)
    tokenizer = _common_tokenizer(prefixes)
    made_by = {"tool": "merge_datasets", "merged": [Path(prefix).name for prefix in prefixes]}
    return join_pairs(output, prefixes, dtype, tokenizer=tokenizer, made_by=made_by)


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """List the prefixes of the datasets given: each a prefix, or a folder for all pairs in it, by name.

    Raises:
        MissingDataError: a folder holds no pair.
        DataError: a dataset is given twice.
    """
    prefixes: list[str] = []
    for given in inputs:
        if not Path(given).is_dir():
            prefixes.append(given.removesuffix(".idx").removesuffix(".bin"))
            continue
        found = sorted(str(index.with_suffix("")) for index in Path(given).glob("*.idx"))
        if not found:
            raise MissingDataError(
                f"--input {given} is a folder without an .idx file: give prefixes or another folder."
            )
        prefixes += found
    twice = [prefix for prefix, count in Counter(prefixes).items() if count > 1]
    if twice:
        raise DataError(f"--input names {twice[0]} twice: a dataset is merged once.")
    return prefixes


def _common_token_type(prefixes: Sequence[str]) -> np.dtype[Any]:
    first = read_header(index_path(prefixes[0])).token_type
    for prefix in prefixes[1:]:
        other = read_header(index_path(prefix)).token_type
        if other != first:
            raise DataError(
                f"{prefixes[0]} holds {first.name} tokens and {prefix} holds {other.name}: they are of different "
                "vocabularies; make them with one tokenizer."
            )
    return first


def _common_tokenizer(prefixes: Sequence[str]) -> TokenizerIdentity | None:
    """Return the tokenizer of all datasets; None when none has a side file that says so."""
    metas = [DatasetMeta.read(prefix) for prefix in prefixes]
    first = metas[0].tokenizer if metas[0] else None
    for prefix, meta in zip(prefixes[1:], metas[1:], strict=True):
        other = meta.tokenizer if meta else None
        if other != first:
            raise DataError(
                f"{prefixes[0]} was made by {_describe(first)}, and {prefix} by {_describe(other)}: ids of two "
                "tokenizers do not mix."
            )
    return first


def _describe(tokenizer: TokenizerIdentity | None) -> str:
    if tokenizer is None:
        return "an unknown tokenizer (no side file)"
    return f"a {tokenizer.name} of {tokenizer.vocab_size} ids (fingerprint {tokenizer.fingerprint[:12]})"
