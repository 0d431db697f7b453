"""Random streams: what ranks draw alike, what they draw apart, and how that survives a restart.

A model draws from torch's default generators, and these are all the state there is. The ranks of a tensor group share
them: dropout on activations that each of them holds whole must be the same everywhere. All other ranks differ. Where
tensor ranks hold different activations (heads, features, shards of the sequence) they must draw apart, which
`rank_stream` does for the length of a `with`: it seeds a generator from one number of the shared stream and the rank.

Since no second stream is kept, whoever restores the default generators (activation recompute, a checkpoint) restores
everything, and what is stored does not depend on the number of tensor ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from megatron.parallel.groups import Group, ParallelGroups

SEED_RANGE = 2**62
"""Seeds are drawn below this and ranks added, which stays within the 64 bits of a generator's seed."""


class RandomStreams:
    """The default generators of this process: torch's on the CPU and on one device, numpy's and Python's.

    Args:
        device: where the model computes; may be the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seed(self, seed: int, groups: ParallelGroups, iteration: int = 0) -> None:
        """Start all streams: the same on the ranks of a tensor group, different on any two other ranks.

        Args:
            seed: of the run, not negative.
            groups: tell the rank's place.
            iteration: optimizer steps that were done before: a run that starts new streams in its middle does not draw
                again what it drew at its beginning.
        """
        # Seeds of one run are neighbours, so no two are equal, and far from those of a run with a neighbouring seed.
        start = _draw_seed(torch.Generator().manual_seed(seed))
        if iteration:
            start = _draw_seed(torch.Generator().manual_seed(start + iteration))
        start += stream_number(groups)
        torch.manual_seed(start)  # the CPU and every device
        np.random.seed(start % 2**32)
        random.seed(start)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every stream in tensors and numbers."""
        _, numpy_key, numpy_position, numpy_has_gauss, numpy_gauss = np.random.get_state(legacy=True)
        version, python_key, python_gauss = random.getstate()
        state = {
            "cpu": torch.get_rng_state(),
            "numpy": {
                "key": torch.from_numpy(np.asarray(numpy_key).astype(np.int64)),
                "position": int(numpy_position),
                "has_gauss": int(numpy_has_gauss),
                "gauss": float(numpy_gauss),
            },
            "python": {"version": version, "key": torch.tensor(python_key), "gauss": python_gauss},
        }
        if self.device.type != "cpu":
            state["device"] = torch.get_device_module(self.device).get_rng_state(self.device)
        return state

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether `state` was saved by a run on the same kind of device."""
        return ("device" in state) == (self.device.type != "cpu")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue every stream where `state_dict` was called, by a run on the same kind of device."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(state["device"].cpu(), self.device)
        torch.set_rng_state(state["cpu"].cpu())
        numpy, python = state["numpy"], state["python"]
        key = numpy["key"].cpu().numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
        random.setstate((python["version"], tuple(python["key"].tolist()), python["gauss"]))


def stream_number(groups: ParallelGroups) -> int:
    """Tell the place of a rank among those that draw apart, from 0: all of the mesh, a tensor group being one."""
    place = groups.pipeline.rank * groups.data.size + groups.data.rank
    return place * groups.ulysses.size + groups.ulysses.rank


def seed_everything(seed: int, groups: ParallelGroups, device: torch.device) -> RandomStreams:
    """Start every random stream of this process; see `RandomStreams.seed`."""
    streams = RandomStreams(device)
    streams.seed(seed, groups)
    return streams


@contextmanager
def rank_stream(group: Group, device: torch.device) -> Iterator[None]:
    """Within the context each rank of the group draws numbers of its own on `device`; afterwards the same ones again.

    All ranks of the group enter together. Each entry takes one number from the shared stream of the CPU, so two
    entries do not draw the same. On a group of one the context does nothing.

        with rank_stream(groups.tensor, hidden_shard.device):
            hidden_shard = F.dropout(hidden_shard, p)
    """
    if group.size == 1:
        yield
        return
    seed = _draw_seed(torch.default_generator) + group.rank
    generator = _default_generator(device)
    shared = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(shared)


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(SEED_RANGE, (), generator=generator, device="cpu"))


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    generator: torch.Generator = module.default_generators[index]
    return generator
