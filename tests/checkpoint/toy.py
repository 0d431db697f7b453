"""Checkpoints of a few numbers: what a rank of any number of ranks holds of them, for tests of the store."""

import torch

from megatron.checkpoint.fragments import Fragment
from megatron.checkpoint.state_file import COUNTERS
from megatron.checkpoint.store import CheckpointStore, Snapshot
from megatron.parallel.random import RandomStreams
from megatron.parallel.sharding import Sharding
from megatron.training.control import Control

SHAPE = (12, 8)
KINDS = ("weight", "exp_avg")
SHARDING = Sharding(logical_shape=SHAPE, dim=None)


def logical(iteration, kind):
    """The whole tensor at an iteration."""
    generator = torch.Generator().manual_seed(1000 * iteration + len(kind))
    return torch.randn(SHAPE, generator=generator)


def fragments(iteration, rank=0, size=1):
    length = logical(0, "weight").numel() // size
    return [
        Fragment("w", kind, SHARDING, rank * length, logical(iteration, kind).flatten()[rank * length :][:length])
        for kind in KINDS
    ]


def streams():
    """Such as every run has, of a fixed seed."""
    state = RandomStreams(torch.device("cpu")).state_dict()
    return {**state, "cpu": torch.Generator().manual_seed(3).get_state()}


def snapshot(iteration, rank=0, size=1):
    counters = {**dict.fromkeys(COUNTERS, 0), "iteration": iteration}
    state = {"counters": counters, "layout": {"data_parallel_size": size}, "engine": {}}
    return Snapshot(iteration=iteration, fragments=fragments(iteration, rank, size), state=state, streams=streams())


def open_store(root, ranks=None, **options):
    return CheckpointStore(root, config={"model": {"num_layers": 2}}, ranks=ranks or Control.alone(), **options)


def save(root, *iterations, ranks=None, **options):
    """Save at each iteration; returns what is complete at the end."""
    ranks = ranks or Control.alone()
    store = open_store(root, ranks, **options)
    done = []
    for iteration in iterations:
        done += store.save(snapshot(iteration, ranks.rank, ranks.size))
    return done + store.finish()
