#!/usr/bin/env python3
"""Measures checkpoints of a run: `python tools/benchmark_checkpoint.py --folder DIR FLAGS OF pretrain_gpt.py`.

Flags of its own come before or between the others:
  --folder DIR     where to write; three times the size of the optimizer's state must be free (default: a temporary one)
  --other "FLAGS"  load into this layout too: flags that replace those of the run; may be repeated
  --deepspeed      measure DeepSpeed's own save_checkpoint and load_checkpoint as well
  --without WHAT   leave out "torch" (torch.save of the same bytes) or "background" (saves beside the training)

Takes one step, so that the optimizer has its moments, and saves and loads them in several ways. It prints seconds, GB
and GB/s of all ranks together. Files are taken out of the page cache before they are read, where the system allows it.
Run it under torchrun for more than one rank.
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
from megatron.engine.launchers import RankEnvironment

if TYPE_CHECKING:
    from megatron.checkpoint.fragments import LogicalTensors
    from megatron.checkpoint.store import Snapshot
    from megatron.training.control import Control
    from megatron.training.trainer import Trainer


@dataclass(frozen=True)
class Row:
    """What one way to save or load took."""

    what: str
    seconds: float
    num_bytes: int

    def __str__(self) -> str:
        """Give the line of it."""
        gigabytes = self.num_bytes / 1e9
        return f"{self.what:60} {self.seconds:9.3f} s {gigabytes:9.3f} GB {gigabytes / self.seconds:8.2f} GB/s"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    from megatron.engine.launch import read_environment

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
    choices = ("torch", "background")
    parser.add_argument("--without", action="append", default=[], choices=choices, help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def measure(
    arguments: argparse.Namespace, words: Sequence[str], environment: RankEnvironment, own: str
) -> Iterator[Row]:
    """Save and load in every way that was asked for."""
    from megatron.checkpoint.fragments import open_tensors

    trainer, clock = start(words, environment)
    root = Path(clock.control.of_first(own))
    num_bytes = 0
    for row in measure_in_place(trainer, clock, root, arguments):
        num_bytes = row.num_bytes
        yield row
    checkpoint = next(root.glob("ours/step_*"))
    state = trainer.engine.state()
    trainer.engine.close()
    del trainer
    for flags in arguments.other:
        forget(checkpoint)
        other, clock = start([*words, *shlex.split(flags)], environment, steps=0)
        load = clock.time(partial(other.engine.load, open_tensors(checkpoint), state))
        yield Row(f"load into {flags}", load, num_bytes)
        other.engine.close()
        del other
    for ranks in (2, 4):
        forget(checkpoint)
        tensors = open_tensors(checkpoint)
        seconds = clock.time(partial(read_shard, tensors, ranks))
        yield Row(f"read as the first of {ranks} tensor ranks, to the host", seconds, num_bytes // ranks)


def measure_in_place(trainer: Trainer, clock: Clock, root: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Save the state of one engine, and load it into the same."""
    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.fragments import open_tensors

    engine, control = trainer.engine, clock.control
    own = sum(fragment.tensor.numel() * fragment.tensor.element_size() for fragment in engine.state_fragments())
    size = sum(control.gather(own))
    if "torch" not in arguments.without:
        yield from measure_torch(trainer, clock, root / f"torch_{control.rank}.pt", size)
    if arguments.deepspeed:
        yield from measure_deepspeed(trainer, clock, root / "deepspeed")
    with closing_store(root / "ours", control) as store:
        yield Row("save", clock.time(lambda: store.save(snapshot(trainer))), size)
    (checkpoint,) = root.glob("ours/step_*")
    forget(checkpoint)
    yield Row("verify", clock.time(lambda: find_checkpoint(checkpoint, control, print)), size)
    forget(checkpoint)
    state = engine.state()
    yield Row("load", clock.time(lambda: engine.load(open_tensors(checkpoint), state)), size)
    yield Row("load again, from the page cache", clock.time(lambda: engine.load(open_tensors(checkpoint), state)), size)
    if "background" not in arguments.without:
        yield from measure_background(trainer, clock, root / "background", size)


def measure_background(trainer: Trainer, clock: Clock, root: Path, size: int) -> Iterator[Row]:
    """Save while the training could go on: it waits for the copies to the host, which the first save makes room for."""
    with closing_store(root, clock.control, background=True) as store:
        for number, which in enumerate(("first", "second")):
            now = replace(snapshot(trainer), iteration=number)
            stall = clock.time(partial(store.save, now))
            rest = clock.time(store.finish)
            yield Row(f"{which} save in the background: training waits", stall, size)
            yield Row(f"{which} save in the background: until it is complete", stall + rest, size)
    clear(root, clock.control)


def measure_torch(trainer: Trainer, clock: Clock, path: Path, size: int) -> Iterator[Row]:
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
    sys.exit(main())
