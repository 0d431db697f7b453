"""Which samples a training takes, in which order, from where: kept by a resumed run, whatever else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.data.datasets import Datasets
from megatron.training.differences import listed


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The training samples in their order.

    Attributes:
        start: samples that the run had consumed before the first of this order.
        num_samples: samples that the order was made for. It decides about epochs and shuffling, so that a training that
            is made longer later keeps it: in the samples that are left of the last epoch, and then from the first on.
        samples: `SampleDataset.description`, which says what each sample is.
        tokenizer: name and fingerprint of the tokenizer, None where it is not known.
    """

    start: int
    num_samples: int
    samples: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give all fields as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SampleOrder:
        """Read what `to_json` gave.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What a resumed run brings along.

    Attributes:
        order: of the checkpoint; None where it does not say.
        consumed: samples that are consumed.
        flags: differences of flags that decide about the samples.
        override: whether other samples are meant.
    """

    order: SampleOrder | None
    consumed: int
    flags: Sequence[object] = ()
    override: bool = False


def open_in_order(
    open_sets: Callable[[int], Datasets],
    total_samples: int,
    continued: Continued | None,
    tokenizer: Mapping[str, Any],
    say: Callable[[str], None],
) -> tuple[Datasets, SampleOrder]:
    """Open the sets of a run with the training samples in the order in which it takes them.

    Args:
        open_sets: opens all of them, the training set with the order for so many samples.
        total_samples: samples of the whole training.
        continued: what is resumed; None: the training begins.
        tokenizer: name and fingerprint.
        say: hears what is worth a line.

    Raises:
        CheckpointError: the samples are not those of the checkpoint, and that is not meant.
    """
    kept = None if continued is None else continued.order
    order = _open(open_sets, kept.start if kept else 0, kept.num_samples if kept else total_samples, tokenizer)
    if continued is None:
        return order
    if kept is None:
        say(f" the checkpoint does not tell its samples: this run's are taken, from number {continued.consumed} on")
        return order
    datasets, found = order
    changes = [*continued.flags, *_changes_of_tokenizer(kept.tokenizer, tokenizer)]
    changes += _changes_of_samples(kept.samples, found.samples)
    if changes and not continued.override:
        raise CheckpointError(
            f"the samples are not those of the checkpoint: {listed(changes)}; go on with the same, or add "
            "--override-data to go on with the new ones from their first on (or --finetune to start a new training)"
        )
    if changes:
        left = max(total_samples - continued.consumed, 1)
        say(f" other samples from here on, from their first on, {left} to come: {listed(changes)}")
        return _open(open_sets, continued.consumed, left, tokenizer)
    _tell_of_length(found, len(datasets.train or ()), total_samples - found.start, say)
    return order


def _open(
    open_sets: Callable[[int], Datasets], start: int, num_samples: int, tokenizer: Mapping[str, Any]
) -> tuple[Datasets, SampleOrder]:
    datasets = open_sets(num_samples)
    samples = {} if datasets.train is None else datasets.train.description
    return datasets, SampleOrder(start=start, num_samples=num_samples, samples=samples, tokenizer=dict(tokenizer))


def _tell_of_length(order: SampleOrder, length: int, wanted: int, say: Callable[[str], None]) -> None:
    if wanted == order.num_samples:
        return
    again = f"; after number {length} it begins again" if wanted > length else ""
    say(f" the order of the samples stays the one that was made for {order.num_samples}, of {wanted} now{again}")


def _changes_of_tokenizer(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if old and old != new:
        yield f"tokenizer {_named(old, 'fingerprint')} -> {_named(new, 'fingerprint')}"


def _changes_of_samples(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """List what differs between two descriptions; length, sequence length and seed are told by their flags."""
    kind = new.get("kind")
    if old.get("kind") != kind:
        yield f"data {_kind(old)} -> {_kind(new)}"
    elif "datasets" in new:
        if old["shares"] != new["shares"]:
            yield f"weights of the data {_shares(old)} -> {_shares(new)}"
        for one, other in zip(old["datasets"], new["datasets"], strict=False):
            yield from _changes_of_samples(one, other)
    elif "idx_sha256" in new:
        if any(old[name] != new[name] for name in ("idx_sha256", "bin_sample_sha256")):
            yield f"data {_named(old, 'bin_sample_sha256')} -> {_named(new, 'bin_sample_sha256')}"
        if old["documents"] != new["documents"]:
            yield f"documents of {new['name']} {_span(old)} -> {_span(new)} (--split)"
    elif old.get("vocab_size") != new.get("vocab_size"):
        yield f"--vocab-size {old.get('vocab_size')} -> {new.get('vocab_size')}"
    if old.get("version") != new.get("version"):
        yield f"version of the order {old.get('version')} -> {new.get('version')}"


def _kind(description: Mapping[str, Any]) -> str:
    names = {"MockDataset": "--mock-data", "BlendedDataset": "a blend", "GPTDataset": "one file"}
    return names.get(description.get("kind", ""), "nothing")


def _named(values: Mapping[str, Any], digest: str) -> str:
    return f"{values.get('name', 'unknown')} ({str(values.get(digest))[:12]})"


def _shares(description: Mapping[str, Any]) -> str:
    return " ".join(f"{share:g}" for share in description["shares"])


def _span(description: Mapping[str, Any]) -> str:
    start, stop = description["documents"]
    return f"{start} to {stop}"
