"""What a run reads: its datasets, and of each of them the micro-batches of this rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from megatron.config.data import DataConfig
from megatron.data.batch import Batch, BatchOptions
from megatron.data.datasets import Datasets, build_datasets
from megatron.data.gpt_dataset import SampleDataset
from megatron.data.loader import build_loader
from megatron.data.tokenizer.interface import Tokenizer
from megatron.kernels.attention.interface import AttentionBackend
from megatron.parallel.groups import Group
from megatron.parallel.ulysses import sequence_shard
from megatron.training.place import Place
from megatron.training.sample_order import Continued, SampleOrder, open_in_order
from megatron.training.trainer import Plan


class Lookahead(Iterator[Batch]):
    """Micro-batches of which the next can be looked at before they are taken."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._seen: deque[Batch] = deque()

    def __next__(self) -> Batch:
        """Take the next one."""
        return self._seen.popleft() if self._seen else next(self._batches)

    def peek(self, count: int) -> list[Batch]:
        """Look at the next ones."""
        self._seen.extend(islice(self._batches, max(count - len(self._seen), 0)))
        return list(islice(self._seen, count))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The datasets of a run, open."""

    datasets: Datasets
    order: SampleOrder
    options: BatchOptions
    micro_batch_size: int
    num_workers: int
    data: Group
    """The ranks that share the samples."""

    def training(self, consumed_samples: int) -> Lookahead:
        """Give this rank's micro-batches after the first `consumed_samples` of all ranks."""
        return Lookahead(self._batches(self.datasets.train, consumed_samples - self.order.start, self.num_workers))

    def held_out(self) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Give, for each set that there is, what starts its micro-batches from the beginning."""
        sets = {"validation": self.datasets.valid, "test": self.datasets.test}
        return {name: partial(self._batches, dataset) for name, dataset in sets.items() if dataset is not None}

    def _batches(
        self, dataset: SampleDataset | None, consumed_samples: int = 0, num_workers: int = 0
    ) -> Iterator[Batch]:
        if dataset is None:
            return iter(())
        return build_loader(
            dataset,
            micro_batch_size=self.micro_batch_size,
            data_rank=self.data.rank,
            data_size=self.data.size,
            consumed_samples=consumed_samples,
            num_workers=num_workers,
            options=self.options,
        )


def open_inputs(
    config: DataConfig,
    plan: Plan,
    place: Place,
    *,
    micro_batch_size: int,
    seed: int,
    trains: bool,
    tokenizer: Tokenizer,
    attention: AttentionBackend,
    continued: Continued | None,
    say: Callable[[str], None],
) -> Inputs:
    """Open the datasets of a run; `say` hears what is worth a line at the start.

    Raises:
        UserError: a file is missing or damaged, or was made with another tokenizer; the training samples are not those
            of the checkpoint that is continued.
    """
    held_out = plan.evaluation_steps * plan.batch_size.final
    datasets, order = open_in_order(
        lambda num_train: build_datasets(
            config,
            num_train=num_train if trains else 0,
            num_valid=held_out,
            num_test=held_out,
            seed=seed,
            tokenizer=tokenizer,
            who=f"rank {place.control.rank}",
            note=say,
        ),
        plan.total_samples or 0,
        continued if trains else None,
        {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        say,
    )
    options = BatchOptions(
        eod_id=tokenizer.eod_id,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
        eod_mask_loss=config.eod_mask_loss,
        dense_mask=attention.dense_document_mask,
        vocab_size=tokenizer.vocab_size,
        positions=sequence_shard(config.seq_length, place.groups.ulysses),
    )
    return Inputs(
        datasets=datasets,
        order=order,
        options=options,
        micro_batch_size=micro_batch_size,
        num_workers=config.num_workers,
        data=place.groups.data,
    )
