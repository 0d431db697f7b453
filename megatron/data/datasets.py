"""The training, validation and test sets of a run, from the flags of the data section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron.config.data import DataConfig
from megatron.data.blend import BlendedDataset, WeightedPrefix, parse_blend, samples_to_build
from megatron.data.errors import DataError
from megatron.data.gpt_dataset import GPTDataset, SampleDataset
from megatron.data.index_cache import IndexCache
from megatron.data.indexed import IndexedDataset
from megatron.data.mock import MockDataset
from megatron.data.split import SPLIT_NAMES, parse_split, require_documents, split_documents
from megatron.data.tokenizer_check import TokenizerLike, check_tokenizer

CACHE_FOLDER = "cache"
WHOLE_FILE = (1.0, 0.0, 0.0)


class Datasets(NamedTuple):
    """The three sets; None where no samples are asked for, or validation and test have no source."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where one set comes from: a blend of files, and the place of its documents in each."""

    name: str
    blend: list[WeightedPrefix]
    shares: tuple[float, float, float]
    place: int
    num_samples: int

    @property
    def is_wanted(self) -> bool:
        return self.num_samples > 0 and len(self.blend) > 0 and self.shares[self.place] > 0


def build_datasets(
    config: DataConfig,
    *,
    num_train: int,
    num_valid: int,
    num_test: int,
    seed: int,
    tokenizer: TokenizerLike | None = None,
    who: str = "this process",
    note: Callable[[str], None] = print,
) -> Datasets:
    """Open, check and index what the flags name; of several processes on a file system one computes the indices.

    Args:
        config: one of `mock_data`, `data_path` with `split`, or `train_data_path` with `valid_data_path` and
            `test_data_path`; `seq_length`; where and how long to wait for indices.
        num_train: training samples that will be asked for; 0 leaves the set out.
        num_valid: validation samples, likewise.
        num_test: test samples, likewise.
        seed: of the sample order.
        tokenizer: the run's tokenizer, compared with the one that made each file; None compares nothing.
        who: name of this process in lock files and messages, as "rank 3".
        note: prints a sentence.

    Raises:
        MissingDataError: a file is not there.
        DataError: a file is damaged, was made by another tokenizer, or has no documents for a set; a flag is not legal.
        DataTimeoutError: another process computes an index for too long.
    """
    counts = (num_train, num_valid, num_test)
    if config.mock_data:
        return _mock_datasets(config, counts, seed)
    sources = _sources(config, counts)
    if num_train > 0 and not sources[0].is_wanted:
        raise DataError(
            "there is no training data: give --data-path (with a share for training in --split), --train-data-path, "
            "or --mock-data."
        )
    files = _open_files(sources, tokenizer, note)
    builder = _Builder(config, seed, files, who, note)
    return Datasets(*(builder.build(source) if source.is_wanted else None for source in sources))


def _mock_datasets(config: DataConfig, counts: tuple[int, int, int], seed: int) -> Datasets:
    if config.vocab_size is None:
        raise DataError("--mock-data needs --vocab-size: the number of different tokens to make.")
    sets = [
        MockDataset(
            vocab_size=config.vocab_size, seq_length=config.seq_length, num_samples=count, seed=seed, stream=stream
        )
        if count > 0
        else None
        for stream, count in enumerate(counts)
    ]
    return Datasets(*sets)


def _sources(config: DataConfig, counts: tuple[int, int, int]) -> list[_Source]:
    separate = (config.train_data_path, config.valid_data_path, config.test_data_path)
    if config.data_path and any(separate):
        raise DataError(
            "--data-path is split by --split, and --train-data-path, --valid-data-path and --test-data-path are not: "
            "give the one or the others."
        )
    if config.data_path:
        blend, shares = parse_blend(config.data_path, "--data-path"), parse_split(config.split)
        return [
            _Source(name=name, blend=blend, shares=shares, place=place, num_samples=counts[place])
            for place, name in enumerate(SPLIT_NAMES)
        ]
    return [
        _Source(
            name=name,
            blend=parse_blend(words, f"--{name}-data-path"),
            shares=WHOLE_FILE,
            place=0,
            num_samples=count,
        )
        for name, words, count in zip(SPLIT_NAMES, separate, counts, strict=True)
    ]


def _open_files(
    sources: list[_Source], tokenizer: TokenizerLike | None, note: Callable[[str], None]
) -> dict[str, IndexedDataset]:
    prefixes = {part.prefix: None for source in sources if source.is_wanted for part in source.blend}
    files = {prefix: IndexedDataset(prefix) for prefix in prefixes}
    if tokenizer is not None:
        for indexed in files.values():
            check_tokenizer(indexed, tokenizer, note)
    return files


class _Builder:
    """Makes the dataset of a source."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        files: dict[str, IndexedDataset],
        who: str,
        note: Callable[[str], None],
    ) -> None:
        self._config = config
        self._seed = seed
        self._files = files
        self._who = who
        self._note = note

    def build(self, source: _Source) -> SampleDataset:
        """Build one set: its only file, or a blend."""
        if len(source.blend) == 1:
            return self._of_file(source, source.blend[0].prefix, source.num_samples)
        parts = [
            self._of_file(source, part.prefix, samples_to_build(source.num_samples, part.weight))
            for part in source.blend
        ]
        shares = [part.weight for part in source.blend]
        cache = self._cache(source.blend[0].prefix)
        return BlendedDataset(parts, shares, num_samples=source.num_samples, cache=cache)

    def _of_file(self, source: _Source, prefix: str, num_samples: int) -> GPTDataset:
        indexed = self._files[prefix]
        documents = split_documents(source.shares, len(indexed))[source.place]
        require_documents(
            documents, source.shares[source.place], name=source.name, prefix=prefix, num_documents=len(indexed)
        )
        return GPTDataset(
            indexed,
            documents,
            seq_length=self._config.seq_length,
            num_samples=num_samples,
            seed=self._seed,
            cache=self._cache(prefix),
        )

    def _cache(self, prefix: str) -> IndexCache:
        folder = self._config.data_cache_path or Path(prefix).parent / CACHE_FOLDER
        timeout_s = 60 * self._config.data_cache_timeout_minutes
        return IndexCache(folder, timeout_s=timeout_s, who=self._who, note=self._note)
