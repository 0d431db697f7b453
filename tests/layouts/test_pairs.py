"""Every pair of features that the table of layouts calls legal runs, and trains as one rank does."""

import itertools
import math

import pytest

from megatron.parallel import graphed
from megatron.training import build_engine, place
from tests import layout_table
from tests.emulated_graphs import Emulated
from tests.emulated_peers import open_anywhere
from tests.layouts.recorded import MODELS, Record, record_all
from tests.ranks import run_on_ranks

RANKS = 4
tool = layout_table.load()


def completed(features):
    """Flags of a set of features with what they leave open; None when they do not go together."""
    merged = tool.merge(*(tool.FEATURES[name] for name in features))
    for choice in itertools.product(*tool.LEFT_OPEN.values()) if merged is not None else ():
        flags = {**dict(zip(tool.LEFT_OPEN, choice, strict=True)), **merged}
        if not tool.refusals(flags, RANKS):
            return flags
    return None


def cover(pairs):
    """Sets of features that go together and have all pairs in them: each takes in what it can, in turn."""
    left, sets = set(pairs), []
    names = {name for pair in pairs for name in pair}
    while left:
        chosen = set(min(left))
        for name in sorted(names, key=lambda name: (-sum(name in pair for pair in left), name)):
            if any({name, other} in map(set, left) for other in chosen) and completed(chosen | {name}):
                chosen.add(name)
        sets.append(sorted(chosen))
        left -= {pair for pair in left if chosen.issuperset(pair)}
    return sets


LEGAL = [pair for pair, cell in tool.build_table().cells.items() if cell == "yes" and completed(pair)]
WITH_DROPOUT = [pair for pair in LEGAL if "dropout" in pair]
SETS = cover(set(LEGAL) - set(WITH_DROPOUT)) + cover(WITH_DROPOUT)
"""Without dropout a run is compared with one rank; masks differ between layouts."""


def flags_of(features):
    words = [word for name, value in completed(features).items() for word in (f"--{name}", value) if word is not None]
    return [*MODELS["llama"], "--micro-batch-size", "1", "--train-iters", "2", "--initial-loss-scale", "256", *words]


def record_all_without_gpus(runs):
    """Python repeats the blocks of runs with graphs, and what tensor ranks copy lies in files."""
    graphed._Recording = Emulated
    build_engine.require_gpu = lambda device: None
    place.open_peer_memory = open_anywhere
    return record_all(runs)


@pytest.fixture(scope="module")
def alone() -> dict[tuple[bool, bool], Record]:
    """The runs on one rank, in fp32 and with products in 8 bits, without and with document masks."""
    shared = [*MODELS["llama"], "--micro-batch-size", "4", "--train-iters", "2"]
    numbers = {False: ["--zero-stage", "0"], True: ["--fp8", "--precision", "bf16", "--zero-stage", "1"]}
    masks = {False: [], True: ["--reset-attention-mask"]}
    runs = {(of, with_masks): [*shared, *numbers[of], *masks[with_masks]] for of in numbers for with_masks in masks}
    (records,) = run_on_ranks(1, record_all, list(runs.values()), initialize=False, deepspeed=True)
    return dict(zip(runs, records, strict=True))


def test_the_sets_have_every_legal_pair_in_them():
    assert all(any(set(pair) <= set(features) for features in SETS) for pair in LEGAL)
    refused = [pair for pair, cell in tool.build_table().cells.items() if cell not in ("yes", "-")]
    assert not [features for features in SETS for pair in refused if set(pair) <= set(features)]


def test_every_legal_pair_trains_as_one_rank_does(alone):
    runs = [flags_of(features) for features in SETS]
    for records in run_on_ranks(RANKS, record_all_without_gpus, runs, initialize=False, deepspeed=True, timeout=300):
        for features, found in zip(SETS, records, strict=True):
            expected = alone["fp8" in features, "document masks" in features]
            bound = 1e-5 if completed(features)["precision"] == "fp32" else 1e-2
            if "dropout" in features:
                bound = 0.3  # other masks than on one rank
            for name in ("losses", "evaluations"):
                numbers = getattr(found, name)
                assert all(map(math.isfinite, numbers))
                assert numbers == pytest.approx(getattr(expected, name), rel=bound), (features, name)
