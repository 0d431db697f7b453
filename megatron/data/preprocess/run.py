"""The whole job of `tools/preprocess_data.py`: inputs to shards, shards to parts, parts to one pair of files a key.

The output is the same, byte for byte, for any number of workers, and however often the job was killed and started anew.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.config.data import DataConfig
from megatron.data.atomic import atomic_writer
from megatron.data.errors import DataError, DuplicateDataError
from megatron.data.indexed import smallest_token_type
from megatron.data.join import join_pairs
from megatron.data.meta import DatasetMeta, TokenizerIdentity, index_path
from megatron.data.preprocess.documents import ReadingRules
from megatron.data.preprocess.encode import EncodingSettings, MalformedInputError, malformed_sentence, start_encoder
from megatron.data.preprocess.inputs import find_inputs
from megatron.data.preprocess.parts import PartFolder, PartRecord
from megatron.data.preprocess.progress import Progress
from megatron.data.preprocess.shards import Shard, ShardPlanner, lines_before, shard_bytes_for
from megatron.data.preprocess.workers import WorkerPool
from megatron.data.tokenizer.build import build_tokenizer
from megatron.data.tokenizer.interface import Tokenizer

FIRST_ERRORS = 5


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What to make of what, and how.

    `shard_bytes` is how much of the input is one unit of work (None: by the size of the input).
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: DataConfig
    rules: ReadingRules
    append_eod: bool = False
    workers: int = 1
    stop_on_error: bool = False
    overwrite: bool = False
    shard_bytes: int | None = None

    def output(self, key: str) -> str:
        """Prefix of the pair of one key, named as Megatron's tool does."""
        return f"{self.output_prefix}_{key}_document"


@dataclass(frozen=True, kw_only=True)
class PreprocessSummary:
    """What was made.

    `first_errors` are the first few malformed lines as "file:line: reason"; `errors_file` has all of them.
    """

    outputs: dict[str, DatasetMeta]
    input_bytes: int
    malformed: int
    empty: int
    first_errors: tuple[str, ...]
    errors_file: Path | None


def preprocess(settings: PreprocessSettings) -> PreprocessSummary:
    """Tokenize the inputs into `<output-prefix>_<key>_document.bin/.idx/.meta.json`.

    Raises:
        DataError: an input is missing or damaged, the output is there already, an unfinished run of other flags is in
            the way, or no input holds a document.
        MalformedInputError: a line is no document, with `stop_on_error`.
        WorkerError: a worker died.
    """
    inputs = find_inputs(settings.inputs)
    tokenizer = build_tokenizer(settings.tokenizer)
    folder = PartFolder(Path(f"{settings.output_prefix}.parts"))
    _refuse_finished(settings, folder)
    total = sum(path.stat().st_size for path in inputs)
    shard_bytes = settings.shard_bytes or shard_bytes_for(total)
    with folder.lock():
        if settings.overwrite:
            folder.clear()
        folder.start(_plan(settings, inputs, tokenizer, shard_bytes))
        _clear_leftovers(Path(settings.output_prefix))
        planner = ShardPlanner(inputs, settings.rules, shard_bytes, folder.path, folder.is_done)
        num_shards = _encode_all(settings, folder, planner, total)
        summary = _join(settings, folder, num_shards, tokenizer, total)
        folder.remove()
    return summary


def _refuse_finished(settings: PreprocessSettings, folder: PartFolder) -> None:
    """Refuse to replace an output, unless it is of a run that was killed while it published several."""
    if settings.overwrite or folder.is_there():
        return
    for key in settings.rules.keys:
        if index_path(settings.output(key)).exists():
            raise DuplicateDataError(
                f"{index_path(settings.output(key))} is there already: replace it with --overwrite, or choose another "
                "--output-prefix."
            )


def _clear_leftovers(output_prefix: Path) -> None:
    """Remove what a run has left that was killed while it wrote the outputs."""
    for leftover in output_prefix.parent.glob(f".{glob.escape(output_prefix.name)}[_.]*.tmp"):
        leftover.unlink(missing_ok=True)


def _plan(settings: PreprocessSettings, inputs: list[Path], tokenizer: Tokenizer, shard_bytes: int) -> dict[str, Any]:
    """List what the parts depend on, under the names of the flags."""
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in inputs]
    return {
        "--input": hashlib.sha256(json.dumps(states).encode()).hexdigest(),
        "--json-keys": list(settings.rules.keys),
        "--parquet-column": list(settings.rules.columns),
        "--text-document": settings.rules.text_document,
        "--append-eod": settings.append_eod,
        "the tokenizer": tokenizer.fingerprint,
        "--shard-megabytes": shard_bytes,
    }


def _encode_all(settings: PreprocessSettings, folder: PartFolder, planner: ShardPlanner, total: int) -> int:
    """Make every part that is not there yet; returns the number of shards."""
    num_shards = 0
    progress = Progress(total)

    def unfinished() -> Iterator[Shard]:
        nonlocal num_shards
        for shard in planner:
            num_shards += 1
            if folder.is_done(shard.number):
                _check_earlier(settings, folder, shard)
                progress.skip(shard.input_bytes)
            else:
                yield shard

    encoding = EncodingSettings(
        folder=folder,
        tokenizer=settings.tokenizer,
        rules=settings.rules,
        append_eod=settings.append_eod,
        stop_on_error=settings.stop_on_error,
    )
    with progress, WorkerPool(settings.workers, partial(start_encoder, encoding)) as pool:
        for record in pool.map(unfinished()):
            progress.advance(record.input_bytes, sum(record.tokens))
    return num_shards


def _check_earlier(settings: PreprocessSettings, folder: PartFolder, shard: Shard) -> None:
    """Stop at a malformed line that an earlier run, told to skip, has passed over."""
    if not settings.stop_on_error or not folder.read_record(shard.number).malformed:
        return
    with folder.errors(shard.number).open("rb") as file:
        first = json.loads(file.readline())
    line = first["line"] + lines_before(shard.pieces[0])
    raise MalformedInputError(malformed_sentence(first["file"], line, first["reason"]))


def _join(
    settings: PreprocessSettings, folder: PartFolder, num_shards: int, tokenizer: Tokenizer, total: int
) -> PreprocessSummary:
    """Write the parts one after the other into the outputs, in the order of the input."""
    records = [folder.read_record(number) for number in range(num_shards)]
    malformed, empty = sum(record.malformed for record in records), sum(record.empty for record in records)
    errors_file, first_errors = _join_errors(settings, folder, records, malformed)
    for i, key in enumerate(settings.rules.keys):
        if not any(record.tokens[i] for record in records):
            folder.remove()
            found = f"; {first_errors[0]}" if first_errors else ""
            raise DataError(
                f"--input holds no document with tokens for {key!r}: {malformed} of "
                f"{sum(record.lines for record in records)} lines are malformed, {empty} texts are empty{found}."
            )
    identity = TokenizerIdentity(
        name=tokenizer.name, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint
    )
    made_by = {"tool": "preprocess_data", "append_eod": settings.append_eod, "malformed": malformed, "empty": empty}
    outputs = {}
    for key in settings.rules.keys:
        prefix = settings.output(key)
        dtype = smallest_token_type(tokenizer.vocab_size)
        parts = [folder.part(number, key) for number in range(num_shards)]
        outputs[prefix] = join_pairs(prefix, parts, dtype, tokenizer=identity, made_by=made_by)
    return PreprocessSummary(
        outputs=outputs,
        input_bytes=total,
        malformed=malformed,
        empty=empty,
        first_errors=tuple(first_errors),
        errors_file=errors_file,
    )


def _join_errors(
    settings: PreprocessSettings, folder: PartFolder, records: list[PartRecord], malformed: int
) -> tuple[Path | None, list[str]]:
    """Write all malformed lines into `<output-prefix>.errors.jsonl`, with line numbers of whole files."""
    path = Path(f"{settings.output_prefix}.errors.jsonl")
    if not malformed:
        path.unlink(missing_ok=True)
        return None, []
    first: list[str] = []
    with atomic_writer(path) as output:
        for entry in _all_errors(folder, records):
            output.write((json.dumps(entry) + "\n").encode())
            if len(first) < FIRST_ERRORS:
                first.append(f"{entry['file']}:{entry['line']}: {entry['reason']}")
    return path, first


def _all_errors(folder: PartFolder, records: list[PartRecord]) -> Iterator[dict[str, Any]]:
    lines_before_shard = 0
    for number, record in enumerate(records):
        if record.first_start == 0:
            lines_before_shard = 0
        if record.malformed:
            with folder.errors(number).open("rb") as file:
                for raw in file:
                    entry = json.loads(raw)
                    yield entry | {"line": entry["line"] + lines_before_shard}
        lines_before_shard += record.lines
