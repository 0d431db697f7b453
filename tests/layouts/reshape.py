"""Pairs of layouts, drawn at random: trained in the one, saved, loaded in the other, trained on.

`python -m tests.layouts.reshape --pairs 100 --seed 7` draws more of them by hand.
"""

from __future__ import annotations

import argparse
import random
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint.fragments import LogicalTensors, open_tensors
from megatron.config.errors import ConfigError
from megatron.config.rules import check_rules
from megatron.config.run import load_run_config, parse_run_config
from megatron.engine.settings import build_settings
from tests.engine import toy
from tests.engine.toy import pretend_fp16_works
from tests.layouts.recorded import COMMON, MODELS, logical_weights
from tests.ranks import run_on_ranks

STEPS, SAVED_AFTER = 12, 6
RUN = shlex.split(
    f"--num-layers 3 --optimizer adam --lr 0.02 --min-lr 0.002 --lr-decay-style cosine --adam-eps 1e-4 --eval-iters 0 "
    f"--train-iters {STEPS} --log-interval {STEPS}"
)
"""Three blocks, which pipeline stages divide unevenly. A larger epsilon keeps Adam from turning the rounding of
gradients that cancel into steps."""


@dataclass(frozen=True)
class Layout:
    """How many ranks share a run, and its flags."""

    ranks: int
    flags: str

    def words(self, model: str) -> list[str]:
        """All flags of the run with a model."""
        return [*COMMON, *MODELS[model], *RUN, *shlex.split(self.flags)]


@dataclass(frozen=True)
class Pair:
    """A model that is trained and saved in one layout, and loaded and trained on in another."""

    model: str
    first: Layout
    second: Layout


@dataclass
class Outcome:
    """What came of a pair: losses of the run that went straight on, and of the one that was loaded in the other layout;
    what differs between the tensors that were saved and those that were loaded."""

    straight: list[float]
    resumed: list[float]
    differences: list[str]


def draw(count: int, seed: int) -> list[Pair]:
    """Draw pairs; one in five is of the same layout twice."""
    chance = random.Random(seed)
    pairs = []
    for _ in range(count):
        model = chance.choice(sorted(MODELS))
        first = draw_layout(chance, model)
        second = first if chance.random() < 0.2 else draw_layout(chance, model)
        pairs.append(Pair(model, first, second))
    return pairs


def draw_layout(chance: random.Random, model: str) -> Layout:
    """Draw a layout until the rules allow it."""
    while True:
        ranks = chance.choice((1, 2, 2, 3, 4, 4, 4))
        tensor, stages, ulysses = (chance.choice(sizes) for sizes in ((1, 1, 2, 4), (1, 1, 2, 3), (1, 1, 2)))
        flags = (
            f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {stages} "
            f"--ds-sequence-parallel-size {ulysses} --zero-stage {chance.randrange(4)} "
            f"--micro-batch-size {chance.choice((1, 2))} "
            f"{chance.choice(('', '--sequence-parallel'))} {chance.choice(('', '--cpu-optimizer'))} "
            f"{chance.choice(('', '', '--remote-device cpu'))}"
        )
        layout = Layout(ranks, flags)
        if ranks % (tensor * stages * ulysses) == 0 and is_legal(layout, model):
            return layout


def is_legal(layout: Layout, model: str) -> bool:
    """Ask the rules, and the settings of DeepSpeed."""
    try:
        config = load_run_config(layout.words(model), layout.ranks).config
        check_rules(config, layout.ranks)
        parallel = config.parallel
        others = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        replicas = layout.ranks // others // parallel.ds_sequence_parallel_size
        build_settings(config, data_parallel_size=replicas, device_type="cpu")
    except ConfigError:
        return False
    return True


def train_pairs(pairs: Sequence[Pair], folder: Path, timeout: float = 600.0) -> list[Outcome]:
    """Train every pair; processes are started once for each number of ranks, and once more to load."""
    numbered = list(enumerate(pairs))
    straight: dict[int, list[float]] = {}
    resumed: dict[int, tuple[list[float], list[str]]] = {}
    for key, function, found in (("first", save_each, straight), ("second", load_each, resumed)):
        sizes = sorted({getattr(pair, key).ranks for pair in pairs})
        for ranks in sizes:
            own = [(number, pair) for number, pair in numbered if getattr(pair, key).ranks == ranks]
            answers = run_on_ranks(ranks, function, own, folder, initialize=False, deepspeed=True, timeout=timeout)
            assert all(answer == answers[0] for answer in answers), "ranks disagree"
            found.update(answers[0])
    return [Outcome(straight[number][SAVED_AFTER:], *resumed[number]) for number, _ in numbered]


def save_each(pairs: Sequence[tuple[int, Pair]], folder: Path) -> dict[int, list[float]]:
    """Train straight through, saving on the way; returns the losses of each pair. On every rank."""
    pretend_fp16_works()
    found = {}
    for number, pair in pairs:
        trainer = build(
            [*pair.first.words(pair.model), "--save", str(folder / str(number)), "--save-interval", str(SAVED_AFTER)]
        )
        found[number] = losses = take_notes(trainer)
        weights: dict[str, Tensor] = {}
        checkpoints, save = trainer._checkpoints, trainer._checkpoints.save

        def noted_save(
            *args: Any,
            save: Any = save,
            trainer: Any = trainer,
            losses: Any = losses,
            weights: Any = weights,
            **kwargs: Any,
        ) -> Any:
            if len(losses) == SAVED_AFTER:  # before the weights change again
                weights.update(logical_weights(trainer.engine.module, trainer.engine.module.groups))
            return save(*args, **kwargs)

        checkpoints.save = noted_save
        assert trainer.fit() == 0
        tensors = open_tensors(checkpoint(folder, number))
        assert set(weights) == set(tensors.names)
        assert not unlike(tensors, weights, dtype_of(trainer.engine.module)), pair
    return found


def load_each(pairs: Sequence[tuple[int, Pair]], folder: Path) -> dict[int, tuple[list[float], list[str]]]:
    """Load and train on; returns the losses of each pair, and which tensors are not those of the checkpoint."""
    pretend_fp16_works()
    found = {}
    for number, pair in pairs:
        trainer = build([*pair.second.words(pair.model), "--load", str(checkpoint(folder, number))])
        engine = trainer.engine
        again = folder / f"{number}-again"
        toy.save(engine, again)
        differences = compare(checkpoint(folder, number), again)
        weights = logical_weights(engine.module, engine.module.groups)
        differences += unlike(open_tensors(again), weights, dtype_of(engine.module))
        losses = take_notes(trainer)
        assert trainer.fit() == 0
        found[number] = losses, differences
    return found


def build(words: Sequence[str]) -> Any:
    """Build a trainer as `pretrain_gpt.py` does."""
    from megatron.engine.launch import read_environment
    from megatron.training.build import build_trainer

    environment = read_environment()
    return build_trainer(parse_run_config(words, environment.world_size, rank=environment.rank), environment)


def take_notes(trainer: Any) -> list[float]:
    """Have the engine write down its losses."""
    losses: list[float] = []
    train_step = trainer.engine.train_step

    def noted_step(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        losses.append(result.loss.item())
        return result

    trainer.engine.train_step = noted_step
    return losses


def checkpoint(folder: Path, number: int) -> Path:
    """Where a pair's first run has saved."""
    return folder / str(number) / f"step_{SAVED_AFTER:07d}"


def compare(first: Path, second: Path) -> list[str]:
    """Name the logical tensors that are not the same, bit for bit, in two checkpoints."""
    one, other = open_tensors(first), open_tensors(second)
    if one.names != other.names:
        return [f"names: {sorted(set(one.names) ^ set(other.names))}"]
    return [
        f"{name} ({kind})"
        for name in one.names
        for kind in {*one.kinds(name), *other.kinds(name)}
        if not torch.equal(one.read(name, kind), other.read(name, kind))
    ]


def unlike(tensors: LogicalTensors, weights: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Name the weights of the forward pass that are not a checkpoint's, cast to its dtype."""
    return [
        f"{name} in the forward pass"
        for name, weight in weights.items()
        if not torch.equal(tensors.read(name).to(dtype).float(), weight)
    ]


def dtype_of(module: nn.Module) -> torch.dtype:
    """Dtype of the forward pass."""
    return next(module.parameters()).dtype


def main() -> None:
    """Draw and train pairs, and tell what came of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    arguments = parser.parse_args()
    pairs = draw(arguments.pairs, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = train_pairs(pairs, Path(folder), timeout=60.0 * arguments.pairs)
    worst = 0.0
    for pair, outcome in zip(pairs, outcomes, strict=True):
        errors = [abs(a - b) / abs(a) for a, b in zip(outcome.straight, outcome.resumed, strict=True)]
        worst = max(worst, *errors)
        print(f"{max(errors):.1e} {outcome.differences or ''} {pair.model}: {pair.first} -> {pair.second}")
    print(f"worst relative error of a loss: {worst:.1e}")


if __name__ == "__main__":
    from tests.layouts import reshape  # the ranks import its functions by this name

    reshape.main()
