"""What a resume means: which checkpoint, what is taken of it, and which differences to this run are allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.find import find_checkpoint, refuse_foreign
from megatron.checkpoint.fragments import WEIGHT, LogicalTensors, open_tensors
from megatron.checkpoint.names import rng_file
from megatron.checkpoint.state_file import read_checkpoint
from megatron.checkpoint.streams import has_streams, read_streams
from megatron.config.checkpoint import CheckpointConfig
from megatron.data.tokenizer_check import TokenizerLike
from megatron.engine.interface import Engine
from megatron.parallel.random import stream_number
from megatron.training.differences import Difference, Kind, find_differences, listed
from megatron.training.place import Place
from megatron.training.sample_order import Continued, SampleOrder
from megatron.training.schedule import Schedule
from megatron.training.state import TrainState

TRAINING = "training"
"""Entry of state.json: what the run said of itself, its vocabulary, and the loss that proves a resume."""

PLACES = ("pipeline_model_parallel_size", "data_parallel_size", "ds_sequence_parallel_size")
"""Axes over which random streams differ."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A checkpoint that was found whole and fits this run.

    Attributes:
        path: its folder.
        saved: its state.json.
        state: the counters with which this run begins.
        differences: of the flags; those of the layout that are no flags are in `layout`.
        layout: number of ranks on each axis that has another one, as `name old -> new`.
        takes_optimizer: whether the optimizer's state continues.
        takes_streams: whether random streams continue where they can.
        takes_progress: whether iteration, schedule and data position continue; else the weights alone are taken.
        trains: whether the run does more than evaluate.
    """

    path: Path
    saved: Mapping[str, Any]
    state: TrainState
    differences: tuple[Difference, ...]
    layout: tuple[str, ...]
    takes_optimizer: bool
    takes_streams: bool
    takes_progress: bool
    trains: bool

    @property
    def training(self) -> Mapping[str, Any]:
        """What the checkpoint says of its training; empty for one that was converted from another program's."""
        said: Mapping[str, Any] = self.saved.get(TRAINING, {})
        return said

    @property
    def run(self) -> Mapping[str, Any]:
        """What the run that saved said of itself (`verify.describe_run`)."""
        said: Mapping[str, Any] = self.training.get("run", {})
        return said

    def changed(self, *kinds: Kind) -> list[Difference]:
        """List the differences of these kinds."""
        return [difference for difference in self.differences if difference.kind in kinds]

    def continued(self, *, override: bool) -> Continued | None:
        """Say what of the samples continues."""
        if not (self.takes_progress and self.trains):
            return None
        order = self.run.get("order")
        return Continued(
            order=None if order is None else SampleOrder.from_json(order),
            consumed=self.state.consumed_samples,
            flags=self.changed(Kind.DATA),
            override=override,
        )


def find_resume(
    checkpoint: CheckpointConfig,
    sections: Mapping[str, Any],
    place: Place,
    tokenizer: TokenizerLike,
    *,
    trains: bool,
    say: Say,
) -> Resume | None:
    """Find what the flags ask for and compare it to this run; None where the run starts from scratch.

    Args:
        checkpoint: the flags.
        sections: of this run.
        place: of this rank.
        tokenizer: its vocabulary must be the checkpoint's.
        trains: whether the run does more than evaluate.
        say: hears what is worth a line.

    Raises:
        CheckpointError: there is none, none is whole, or it does not fit; every reason at once.
    """
    path = _find(checkpoint, place, say)
    if path is None:
        return None
    found = read_checkpoint(path)
    weights_only = checkpoint.finetune
    with_optimizer = trains and not weights_only and not checkpoint.no_load_optim
    differences = find_differences(found.config, _as_json(sections), weights_only=weights_only or not trains)
    resume = Resume(
        path=path,
        saved=found.state,
        state=TrainState() if weights_only else TrainState.from_json(found.state["counters"]),
        differences=tuple(differences),
        layout=tuple(_moved(found.state["layout"], place.layout, {one.name for one in differences})),
        takes_optimizer=with_optimizer,
        takes_streams=trains and not weights_only and not checkpoint.no_load_rng,
        takes_progress=not weights_only,
        trains=trains,
    )
    _require_same_model(resume, tokenizer)
    if with_optimizer:
        _require_optimizer(open_tensors(path), path)
    _tell(resume, say)
    return resume


def continue_schedule(schedule: Schedule, resume: Resume | None, checkpoint: CheckpointConfig, say: Say) -> Schedule:
    """Choose between the schedule of the flags and that of the checkpoint.

    Raises:
        CheckpointError: they differ, and the flags do not say which holds.
    """
    if resume is None or not (resume.takes_progress and resume.trains):
        return schedule
    said = resume.run.get("schedule")
    if said is None:
        if checkpoint.use_checkpoint_opt_param_scheduler:
            raise CheckpointError(
                f"{resume.path} does not tell its schedule, which --use-checkpoint-opt-param-scheduler asks for: give "
                "the schedule's flags instead"
            )
        return schedule
    saved = Schedule.from_json(said)
    changes = saved.changes(schedule)
    if not changes:
        return schedule
    if checkpoint.use_checkpoint_opt_param_scheduler:
        say(f" the checkpoint's schedule holds, and not that of the flags: {listed(changes)}")
        return saved
    if checkpoint.override_opt_param_scheduler:
        say(f" another schedule from here on: {listed(changes)}")
        return schedule
    raise CheckpointError(
        f"the schedule is not that of the checkpoint: {listed(changes)}; give its values, or add "
        "--override-opt-param-scheduler to follow the flags or --use-checkpoint-opt-param-scheduler to follow the "
        "checkpoint"
    )


def restore(resume: Resume, engine: Engine, place: Place, seed: int, *, drops: bool, say: Say) -> None:
    """Put weights, optimizer state and random streams in place, as far as they are taken.

    Args:
        resume: what is taken.
        engine: new.
        place: of this rank.
        seed: of the run.
        drops: whether the training draws masks of dropout.
        say: hears what that means for the streams.
    """
    state = resume.saved.get("engine") if resume.takes_optimizer else None
    engine.load(open_tensors(resume.path), state, optimizer=resume.takes_optimizer)
    if not (resume.takes_progress and resume.trains):
        return
    streams = _streams_of(resume, place)
    if isinstance(streams, str):
        place.streams.seed(seed, place.groups, resume.state.iteration)
        told = f"new random streams begin, which follow from seed, iteration and rank: {streams}"
    else:
        _continue_streams(resume, place, streams)
        tensor = "tensor_model_parallel_size"
        same = resume.saved["layout"].get(tensor, 1) == place.layout[tensor]
        told = "" if same else "the random streams continue; fused dropout draws the masks of an uninterrupted run"
    if drops and told:
        say(f" {told}")


def streams_continue(resume: Resume, place: Place) -> bool:
    """Whether this run draws what an uninterrupted one would."""
    return not isinstance(_streams_of(resume, place), str)


def _continue_streams(resume: Resume, place: Place, streams: Mapping[str, Any]) -> None:
    try:
        place.streams.load_state_dict(streams)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # of the right form, and no state of theirs
        raise CheckpointError(
            f"{resume.path / rng_file(_stream_of(resume, place))} holds no random streams ({error}): load another "
            "checkpoint, or give --no-load-rng"
        ) from error


def _stream_of(resume: Resume, place: Place) -> int:
    """Tell which rank of the run that saved drew what this one's place draws."""
    size: int = resume.saved["layout"].get("tensor_model_parallel_size", 1)
    return stream_number(place.groups) * size


def _streams_of(resume: Resume, place: Place) -> Mapping[str, Any] | str:
    """Read the streams of this rank's place, the same on all its tensor ranks; or say why there are none."""
    if not resume.takes_streams:
        return "the flags take none of the checkpoint's"
    saved = resume.saved["layout"]
    other = [name.replace("_", "-") for name in PLACES if saved.get(name, 1) != place.layout[name]]
    if other:
        return f"the checkpoint's are those of another {' and '.join(other)}"
    rank = _stream_of(resume, place)
    if not has_streams(resume.path, rank):
        return "the checkpoint holds none"
    streams = read_streams(resume.path, rank)
    return streams if place.streams.fits(streams) else "the checkpoint's are those of another kind of device"


def _find(checkpoint: CheckpointConfig, place: Place, say: Say) -> Path | None:
    if checkpoint.load is None:
        path = None
    else:
        path = find_checkpoint(Path(checkpoint.load), place.control, say, checkpoint.load_tag)
        if path is None and (checkpoint.exit_on_missing_checkpoint or not checkpoint.load_if_exists):
            raise CheckpointError(
                f"--load {checkpoint.load} holds no checkpoint: correct the folder, or add --load-if-exists to start "
                "from scratch when there is none"
            )
    if checkpoint.save is not None:
        _refuse_foreign(checkpoint, checkpoint.save, path, place)
    return path


def _refuse_foreign(checkpoint: CheckpointConfig, save: str, path: Path | None, place: Place) -> None:
    if not checkpoint.finetune:
        refuse_foreign(Path(save), path, place.control)
        return
    try:
        refuse_foreign(Path(save), None, place.control)
    except CheckpointError as error:
        raise CheckpointError(
            f"--finetune starts a new run, and --save {save} holds checkpoints already: give it a folder of its own, "
            f"or continue the run of that one with --load {save} and without --finetune"
        ) from error


def _require_same_model(resume: Resume, tokenizer: TokenizerLike) -> None:
    fatal: list[object] = list(resume.changed(Kind.ARCHITECTURE))
    vocab_size = resume.training.get("vocab_size", tokenizer.vocab_size)
    if vocab_size != tokenizer.vocab_size:
        fatal.append(f"vocabulary {vocab_size} -> {tokenizer.vocab_size} tokens (the tokenizer's)")
    ways = "start with the checkpoint's values, or without --load"
    if resume.takes_optimizer and resume.changed(Kind.OPTIMIZER):
        fatal += resume.changed(Kind.OPTIMIZER)
        ways += " (--no-load-optim takes the weights to another optimizer)"
    if fatal:
        raise CheckpointError(f"the checkpoint {resume.path} is of another model: {listed(fatal)}; {ways}")


def _require_optimizer(tensors: LogicalTensors, path: Path) -> None:
    if all(set(tensors.kinds(name)) <= {WEIGHT} for name in tensors.names):
        raise CheckpointError(
            f"{path} holds weights and no optimizer state: add --no-load-optim to go on with a fresh optimizer, or "
            "--finetune to start a new training from the weights"
        )


def _tell(resume: Resume, say: Say) -> None:
    if not resume.takes_progress:
        say(f" a new training from the weights of {resume.path}")
    else:
        state = resume.state
        say(f" resuming {resume.path}: iteration {state.iteration}, {state.consumed_samples} samples")
    if resume.takes_progress and (moved := [*resume.layout, *resume.changed(Kind.LAYOUT)]):
        say(f" the same training in another layout, equal within rounding: {listed(moved)}")
    if changes := resume.changed(Kind.NOTED, Kind.OPTIMIZER):
        say(f" changed since that checkpoint: {listed(changes)}")


def _as_json(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Turn tuples to lists, as they come back from a file."""
    values: dict[str, Any] = json.loads(json.dumps(sections))
    return values


def _moved(saved: Mapping[str, int], layout: Mapping[str, int], told: set[str]) -> Iterator[str]:
    for name, size in layout.items():
        if name not in told and saved.get(name, size) != size:
            yield f"{name.replace('_', '-')} {saved[name]} -> {size}"
