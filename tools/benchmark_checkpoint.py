#!/usr/bin/env python3
"""Measures checkpoints of a run: `python tools/benchmark_checkpoint.py --folder DIR FLAGS OF pretrain_gpt.py`.

Flags of its own come before or between the others:
  --folder DIR     where to write; three times the size of the optimizer's state must be free (default: a temporary one)
  --other "FLAGS"  load into this layout too: flags that replace those of the run; may be repeated
  --deepspeed      measure DeepSpeed's own save_checkpoint and load_checkpoint as well
  --without WHAT   leave out "verify", "load", "background" (saves while steps are taken), "export" (a folder of Hugging
                   Face), "torch" (torch.save of the same bytes), "torch.load" (of these) or "shards" (reads of what
                   one tensor rank holds)
  --keep DIR       move the checkpoint there in the end
  --checkpoint DIR load this checkpoint into the layout of the flags and into the others, and do nothing else

Takes one step, so that the optimizer has its moments, and saves and loads them in several ways. It prints seconds, GB
and GB/s of all ranks together. Files are taken out of the page cache before they are read, where the system allows it.
Run it under torchrun for more than one rank; with --keep and --checkpoint also under different numbers of them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from megatron.config.errors import UserError, tell
from megatron.config.run import parse_run_config
from megatron.engine.launch import leave, read_environment
from megatron.engine.launchers import RankEnvironment

if TYPE_CHECKING:
    from megatron.checkpoint.fragments import LogicalTensors
    from megatron.checkpoint.store import Snapshot
    from megatron.engine.interface import Engine
    from megatron.training.control import Control
    from megatron.training.trainer import Trainer


PARTS = ("verify", "load", "background", "export", "torch", "torch.load", "shards")
STEPS_ALONE = 3
"""Steps that are measured without a save beside them."""


@dataclass(frozen=True)
class Row:
    """What one way to save or load took."""

    what: str
    seconds: float
    num_bytes: int | None = None

    def __str__(self) -> str:
        """Give the line of it."""
        if self.num_bytes is None:
            return f"{self.what:60} {self.seconds:9.3f} s"
        gigabytes = self.num_bytes / 1e9
        return f"{self.what:60} {self.seconds:9.3f} s {gigabytes:9.3f} GB {gigabytes / self.seconds:8.2f} GB/s"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    arguments, words = parse(argv)
    environment = read_environment()
    try:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark-checkpoint-") as own:
            for row in measure(arguments, words, environment, own):
                if environment.rank == 0:
                    print(row, flush=True)
    except UserError as error:
        tell(error, rank=environment.rank)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Tell this tool's flags from those of the run."""
    parser = argparse.ArgumentParser(
        usage="benchmark_checkpoint.py [FLAGS OF ITS OWN] FLAGS OF pretrain_gpt.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--other", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def measure(
    arguments: argparse.Namespace, words: Sequence[str], environment: RankEnvironment, own: str
) -> Iterator[Row]:
    """Save and load in every way that was asked for."""
    if arguments.checkpoint is not None:
        for flags in ("", *arguments.other):
            what = f"load into {flags or 'the layout of the flags'}"
            yield measure_other(arguments.checkpoint, [*words, *shlex.split(flags)], environment, what)
        return
    trainer, clock = start(words, environment)
    root = Path(clock.control.of_first(own))
    yield from measure_in_place(trainer, clock, root, arguments, words)
    trainer.engine.close()
    del trainer
    checkpoint = next(root.glob("ours/step_*"))
    for flags in arguments.other:
        yield measure_other(checkpoint, [*words, *shlex.split(flags)], environment, f"load into {flags}")
    if "shards" not in arguments.without:
        yield from measure_shards(checkpoint, clock)
    if arguments.keep is not None and clock.control.is_first:
        shutil.move(checkpoint, arguments.keep)
    clock.control.barrier()


def measure_in_place(
    trainer: Trainer, clock: Clock, root: Path, arguments: argparse.Namespace, words: Sequence[str]
) -> Iterator[Row]:
    """Save the state of one engine, and load it into the same."""
    from megatron.checkpoint.find import find_checkpoint

    control, without = clock.control, arguments.without
    own = sum(fragment.tensor.numel() * fragment.tensor.element_size() for fragment in trainer.engine.state_fragments())
    size = sum(control.gather(own))
    with closing_store(root / "ours", control) as store:
        yield Row("save", clock.time(lambda: store.save(snapshot(trainer))), size)
    (checkpoint,) = root.glob("ours/step_*")
    if "verify" not in without:
        forget(checkpoint)
        yield Row("verify", clock.time(lambda: find_checkpoint(checkpoint, control, print)), size)
    if "load" not in without:
        load = partial(load_into, trainer.engine, checkpoint)
        forget(checkpoint)
        yield Row("load", clock.time(load), size)
        yield Row("load again, from the page cache", clock.time(load), size)
    if "background" not in without:
        yield from measure_background(trainer, clock, root / "background", size)
    if "export" not in without:
        forget(checkpoint)
        yield measure_export(clock, checkpoint, root / "hf", words)
    if "torch" not in without:
        yield from measure_torch(
            trainer, clock, root / f"torch_{control.rank}.pt", size, loads="torch.load" not in without
        )
    if arguments.deepspeed:
        yield from measure_deepspeed(trainer, clock, root / "deepspeed")


def measure_other(checkpoint: Path, words: Sequence[str], environment: RankEnvironment, what: str) -> Row:
    """Load a checkpoint into the layout of these flags."""
    forget(checkpoint)
    other, clock = start(words, environment, steps=0)
    row = Row(what, clock.time(partial(load_into, other.engine, checkpoint)), bytes_of(checkpoint))
    other.engine.close()
    return row


def bytes_of(checkpoint: Path) -> int:
    """Count the bytes of a checkpoint's tensors."""
    return sum(path.stat().st_size for path in checkpoint.glob("tensors_*.safetensors"))


def load_into(engine: Engine, checkpoint: Path) -> None:
    """Load all of a checkpoint."""
    from megatron.checkpoint.fragments import open_tensors
    from megatron.checkpoint.state_file import read_checkpoint

    engine.load(open_tensors(checkpoint), read_checkpoint(checkpoint).state["engine"])


def measure_shards(checkpoint: Path, clock: Clock) -> Iterator[Row]:
    """Read what one of several tensor ranks holds, to the host: the reading of a load in another layout."""
    from megatron.checkpoint.fragments import open_tensors

    size = bytes_of(checkpoint)
    for ranks in (2, 4):
        forget(checkpoint)
        seconds = clock.time(partial(read_shard, open_tensors(checkpoint), ranks))
        yield Row(f"read as the first of {ranks} tensor ranks, to the host", seconds, size // ranks)


def measure_background(trainer: Trainer, clock: Clock, root: Path, size: int) -> Iterator[Row]:
    """Save while steps are taken: training waits for the copies to the host, which the first save makes room for."""
    alone = sum(clock.time(trainer._train_step) for _ in range(STEPS_ALONE)) / STEPS_ALONE
    yield Row("a step without a save", alone)
    with closing_store(root, clock.control, background=True) as store:
        for number, which in enumerate(("first", "second")):
            now = replace(snapshot(trainer), iteration=number)
            stall = clock.time(partial(store.save, now))
            steps: list[float] = []
            started = time.perf_counter()
            while not store.poll():
                steps.append(clock.time(trainer._train_step))
            total = stall + time.perf_counter() - started
            yield Row(f"{which} save in the background: training waits", stall, size)
            yield Row(f"{which} save in the background: until it is complete", total, size)
            if steps:
                mean = sum(steps) / len(steps)
                yield Row(f"{which} save in the background: each of {len(steps)} steps meanwhile", mean)
    clear(root, clock.control)


def measure_export(clock: Clock, checkpoint: Path, folder: Path, words: Sequence[str]) -> Row:
    """Write the checkpoint as a model of Hugging Face; the first rank does, as `--save-hf` and the converter do."""
    from megatron.checkpoint.fragments import open_tensors
    from megatron.convert.hugging_face.exporting import export_model

    config = parse_run_config(words, clock.control.size)
    precision = config.training.precision

    def export() -> None:
        if clock.control.is_first:
            export_model(open_tensors(checkpoint), folder, model=config.model, data=config.data, precision=precision)

    seconds = clock.time(export)
    size = sum(path.stat().st_size for path in folder.iterdir())
    clear(folder, clock.control)
    return Row(f"export to Hugging Face, in {precision}", seconds, size)


def measure_torch(trainer: Trainer, clock: Clock, path: Path, size: int, *, loads: bool) -> Iterator[Row]:
    """Save the same bytes as one list of tensors, in one file of each rank, without digests."""
    import torch

    fragments = list(trainer.engine.state_fragments())

    def save() -> None:
        with open(path, "wb") as file:
            torch.save([fragment.tensor for fragment in fragments], file)
            file.flush()
            os.fsync(file.fileno())

    def load() -> None:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        for fragment, tensor in zip(fragments, tensors, strict=True):
            fragment.tensor.copy_(tensor)

    yield Row("torch.save and fsync", clock.time(save), size)
    if loads:
        forget(path)
        yield Row("torch.load and copy", clock.time(load), size)
    path.unlink()


def measure_deepspeed(trainer: Trainer, clock: Clock, folder: Path) -> Iterator[Row]:
    """DeepSpeed's own checkpoint, which has the weights of the forward pass beside the state."""
    from megatron.engine.launch import quiet_stdout

    engine: Any = trainer.engine
    with quiet_stdout():
        save = clock.time(lambda: engine._engine.save_checkpoint(str(folder), tag="tag"))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        forget(folder / "tag")
        load = clock.time(lambda: engine._engine.load_checkpoint(str(folder), tag="tag"))
    yield Row("DeepSpeed's save_checkpoint", save, size)
    yield Row("DeepSpeed's load_checkpoint", load, size)
    clear(folder, clock.control)


class Clock:
    """Measures what all ranks do together.

    Args:
        control: the ranks.
        cuda: whether there is a device to wait for.
    """

    def __init__(self, control: Control, *, cuda: bool) -> None:
        self.control = control
        self._cuda = cuda

    def time(self, work: Callable[[], object]) -> float:
        """Seconds until the last rank has done it."""
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        import torch

        if self._cuda:
            torch.cuda.synchronize()
        self.control.barrier()


def start(words: Sequence[str], environment: RankEnvironment, steps: int = 1) -> tuple[Trainer, Clock]:
    """Build a run and take its first steps."""
    from datetime import timedelta

    from megatron.training.build import build_trainer
    from megatron.training.control import Control

    config = parse_run_config(words, environment.world_size, rank=environment.rank)
    trainer = build_trainer(config, environment)
    for _ in range(steps):
        trainer._train_step()
    control = Control.of_world(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    return trainer, Clock(control, cuda=trainer.engine.device.type == "cuda")


def snapshot(trainer: Trainer) -> Snapshot:
    """Take what a checkpoint of the run holds."""
    from megatron.checkpoint.store import Snapshot

    engine, counters = trainer.engine, trainer.state.to_json()
    state = {"counters": counters, "layout": {}, "engine": engine.state()}
    return Snapshot(iteration=trainer.state.iteration, fragments=list(engine.state_fragments()), state=state)


def closing_store(root: Path, control: Control, *, background: bool = False) -> Any:
    """Open a store in a folder of its own."""
    from contextlib import closing

    from megatron.checkpoint.store import CheckpointStore

    return closing(CheckpointStore(root, config={}, ranks=control, background=background))


def read_shard(tensors: LogicalTensors, ranks: int) -> None:
    """Read what the first of so many tensor ranks holds, and what all of them hold."""
    from megatron.checkpoint.ranges import shard_numel

    for name in tensors.names:
        sharding = tensors.sharding(name)
        if sharding.dim is not None:
            sharding = replace(sharding, num_shards=ranks, rank=0)
        for kind in tensors.kinds(name):
            tensors.read_range(name, kind, sharding, 0, shard_numel(sharding)).clone()


def forget(path: Path) -> None:
    """Take files out of the page cache, so that they are read from the disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def clear(folder: Path, control: Control) -> None:
    """Remove a folder once nobody needs it."""
    control.barrier()
    if control.is_first:
        shutil.rmtree(folder)
    control.barrier()


if __name__ == "__main__":
    leave(main())
