"""Runs to be killed: the training of a few numbers on real ranks with the real store, and the real training.

The toy has what a training has to bring back: weights and a moment divided over the ranks, random numbers that differ
from rank to rank, counters. A loss that is off by one bit anywhere changes all later ones.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.fragments import Fragment, open_tensors
from megatron.checkpoint.state_file import read_checkpoint
from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.streams import read_streams
from megatron.parallel.random import RandomStreams
from megatron.parallel.sharding import Sharding
from megatron.training.checkpoint import CheckpointWriter
from megatron.training.control import Control
from megatron.training.state import TrainState
from tests.faults.points import arm

ITERATIONS = 14
INTERVAL = 2
KEEP_LAST = 2
KEEP_EVERY = 6
NUMEL = 4096
STEP_SECONDS = 0.002
SHARDING = Sharding(logical_shape=(NUMEL,), dim=None)


class ToyEngine:
    """Trains a vector that is divided over the ranks."""

    def __init__(self, ranks: Control) -> None:
        length = NUMEL // ranks.size
        self._start = ranks.rank * length
        self._scale = 1.0
        self._tensors = {kind: torch.zeros(length) for kind in ("weight", "exp_avg")}

    def train_step(self) -> float:
        time.sleep(STEP_SECONDS)
        weight, moment = self._tensors["weight"], self._tensors["exp_avg"]
        moment.mul_(0.9).add_(torch.randn_like(weight) + weight.sin(), alpha=0.1 * self._scale)
        weight.sub_(moment)
        self._scale *= 1.01
        loss = weight.square().sum()
        dist.all_reduce(loss)
        return loss.item()

    def state_fragments(self):
        for kind, tensor in self._tensors.items():
            yield Fragment("vector", kind, SHARDING, self._start, tensor)

    def state(self):
        return {"scale": self._scale}

    def load(self, folder: Path, state) -> None:
        tensors = open_tensors(folder)
        for kind, tensor in self._tensors.items():
            tensor.copy_(tensors.read_range("vector", kind, SHARDING, self._start, tensor.numel()))
        self._scale = state["scale"]


def train(save: str, rank: int, size: int, meeting: str, background: bool, fault: list | None) -> int:
    """Train the toy to its end, from where its checkpoints are; `fault` is a point and a number of calls."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    root, ranks = Path(save), Control.of_world(timedelta(seconds=60))
    engine, state, streams = ToyEngine(ranks), TrainState(), RandomStreams(torch.device("cpu"))
    torch.manual_seed(rank)
    path = find_checkpoint(root, ranks, lambda text: print(f"note: {text}", flush=True))
    if path is not None:
        loaded = read_checkpoint(path)
        state = TrainState.from_json(loaded.state["counters"])
        engine.load(path, loaded.state["engine"])
        streams.load_state_dict(read_streams(path, rank))
    store = CheckpointStore(
        root, config={}, ranks=ranks, keep_last=KEEP_LAST, keep_every=KEEP_EVERY, background=background
    )
    writer = CheckpointWriter(store, layout={}, streams=streams)
    if path is not None:
        writer.tidy(path)
    if fault:
        arm(*fault)
    try:
        with (root / "losses").open("a") as log:
            while state.iteration < ITERATIONS:
                loss = engine.train_step()
                state.advance(samples=1, tokens=1)
                if ranks.is_first:
                    log.write(f"{state.iteration} {loss.hex()}\n")
                    log.flush()
                writer.poll()
                if state.iteration % INTERVAL == 0:
                    writer.save(engine, state)
            writer.finish()
    finally:
        writer.close()
    return 0


def pretrain(flags: list[str], fault: list | None) -> int:
    """Run `pretrain_gpt.py` in this process."""
    import pretrain_gpt

    torch.set_num_threads(1)
    if fault:
        arm(*fault)
    sys.argv = ["pretrain_gpt.py", *flags]
    return pretrain_gpt.main()


def losses(save: Path) -> dict[int, str]:
    """Read what the toy reported; of an iteration that was done twice, the later one."""
    path = save / "losses"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {int(line.split()[0]): line.split()[1] for line in lines if line.endswith("\n") and len(line.split()) == 2}
