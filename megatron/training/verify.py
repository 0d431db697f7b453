"""The proof that a resumed run is the one that was interrupted (`--verify-resume`).

Three things are compared: what the engine holds with what the checkpoint's files say; the loss of the samples that come
next, without dropout, with what it was when the checkpoint was saved; and each step that the earlier run went on to do
with the same step now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import LogicalTensors, open_tensors
from megatron.checkpoint.schema import fits
from megatron.checkpoint.state_file import RUN
from megatron.config.checkpoint import CheckpointConfig
from megatron.engine.interface import Engine
from megatron.training.control import Control
from megatron.training.differences import Kind, changed_values, find_differences, listed
from megatron.training.place import Place
from megatron.training.proof import Proof
from megatron.training.resume import Resume, Say, streams_continue
from megatron.training.schedule import Schedule
from megatron.training.state import TrainState
from megatron.training.step_log import STEPS, RecordedSteps, StepLog, StepNumbers, read_steps

BOUND = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
"""Relative difference of a loss that rounding explains, where the order of the sums is another."""

NORM_BOUND = 5.0
"""The same of a gradient norm, in units of `BOUND`."""

WAYS = (
    "nothing was saved; take another checkpoint with --load-tag, or resume without --verify-resume if the difference "
    "is known"
)

WITHOUT_EFFECT = frozenset(
    {"train_iters", "train_samples", "train_tokens", "valid_data_path", "test_data_path", "init_method_std"}
)
"""Fields that a step's numbers do not depend on: what matters of them is in the schedule and the samples' order."""


@dataclass(frozen=True)
class Comparison:
    """How the numbers of two runs are to be compared.

    Attributes:
        obstacle: why they cannot be; None when they can.
        rounding: what differs that rounds otherwise; empty: every bit must agree.
        bound: relative difference of a loss that this explains.
    """

    obstacle: str | None
    rounding: str
    bound: float


def compare_runs(
    old: Mapping[str, Any], new: Mapping[str, Any], *, in_training: bool, same_streams: bool = True
) -> Comparison:
    """Judge from what two runs say of themselves.

    Args:
        old: the earlier run, of `describe_run`.
        new: this one.
        in_training: numbers of training steps; else of an evaluation of the next samples.
        same_streams: this run draws what the earlier one drew.
    """
    found = find_differences(old["config"], new["config"])
    rounds = [one for one in found if one.kind is Kind.LAYOUT or one.section == "kernels"]
    other: list[object] = [one for one in found if one not in rounds and one.name not in WITHOUT_EFFECT]
    if in_training:
        other += Schedule.from_json(old["schedule"]).changes(Schedule.from_json(new["schedule"]))
    else:
        other = [one for one in found if one.kind in (Kind.ARCHITECTURE, Kind.DATA)]
    if old["order"] != new["order"]:
        other.append("other samples")
    moved = [*changed_values(old["layout"], new["layout"]), *changed_values(old["software"], new["software"])]
    rounding = listed(dict.fromkeys([*map(str, rounds), *moved]))
    model = new["config"]["model"]
    drops = model["hidden_dropout"] > 0 or model["attention_dropout"] > 0
    if in_training and drops and (rounding or not same_streams):
        other.append("other masks of dropout")
    precisions = {run["config"]["training"]["precision"] for run in (old, new)}
    return Comparison(
        obstacle=listed(other) or None, rounding=rounding, bound=max(BOUND[precision] for precision in precisions)
    )


class StepCheck:
    """Compares the steps of this run with those that were recorded, as they come.

    Args:
        recorded: by iteration.
        comparison: how; without an obstacle.
        exact_backward: whether the device adds up gradients in one order always; else their norm may round otherwise,
            and the steps after that one are not compared.
        say: hears the result.
    """

    def __init__(
        self, recorded: Mapping[int, StepNumbers], comparison: Comparison, *, exact_backward: bool, say: Say
    ) -> None:
        self._left = dict(sorted(recorded.items()))
        self._comparison = comparison
        self._exact_backward = exact_backward
        self._say = say
        self._equal = 0

    @property
    def pending(self) -> bool:
        """Whether there are steps to compare still."""
        return bool(self._left)

    def saw(self, iteration: int, numbers: StepNumbers) -> None:
        """Compare a step.

        Raises:
            CheckpointError: it is another one.
        """
        expected = self._left.pop(iteration, None)
        if expected is None:
            return
        if numbers == expected:
            self._equal += 1
            if self._equal == 1 or not self._left:
                self._say(f" verified: iteration {iteration} is the recorded one, bit for bit")
            return
        error, norm_error = _error(numbers.loss, expected.loss), _error(numbers.grad_norm, expected.grad_norm)
        bound = self._comparison.bound
        may_round = self._comparison.rounding or (not self._exact_backward and numbers.loss == expected.loss)
        if not may_round or not error <= bound or not norm_error <= NORM_BOUND * bound:
            raise CheckpointError(
                f"--verify-resume: iteration {iteration} has the loss {_number(numbers.loss)} and the gradient norm "
                f"{_number(numbers.grad_norm)}, where the earlier run recorded {_number(expected.loss)} and "
                f"{_number(expected.grad_norm)}: it is not the same training; {WAYS}"
            )
        self._left.clear()  # from here on the runs drift apart
        self._say(
            f" verified: iteration {iteration} is the recorded one within rounding: loss {error:.1e}, gradient norm "
            f"{norm_error:.1e} (at most {bound:.0e} and {NORM_BOUND * bound:.0e})"
        )


class Watch:
    """Takes note of each step: compares it with the recorded one, then records it.

    While there are recorded steps to compare nothing is written, so that they are there still when a comparison fails.

    Args:
        check: compares; None: there is nothing to compare.
        log: records; None: another rank does, or nothing is saved.
    """

    def __init__(self, check: StepCheck | None, log: StepLog | None) -> None:
        self._check = check
        self._log = log
        self._held: list[tuple[int, StepNumbers]] = []

    def saw(self, iteration: int, loss: float, grad_norm: float) -> None:
        """Take the numbers of a step; see `StepCheck.saw`."""
        numbers = StepNumbers.of(loss, grad_norm)
        if self._check is not None:
            self._check.saw(iteration, numbers)
        if self._log is None:
            return
        self._held.append((iteration, numbers))
        if self._check is None or not self._check.pending:
            for step in self._held:
                self._log.write(*step)
            self._held.clear()

    def close(self) -> None:
        """Close the record."""
        if self._log is not None:
            self._log.close()


def build_watch(
    checkpoint: CheckpointConfig,
    resume: Resume | None,
    engine: Engine,
    proof: Proof,
    place: Place,
    state: TrainState,
    say: Say,
) -> Watch:
    """Prove the resume before the first step, where that is asked for, and prepare for the steps.

    Raises:
        CheckpointError: it is not proven; on all ranks.
    """
    check, log = None, None
    if checkpoint.verify_resume and resume is not None:
        check = verify_resume(resume, engine, proof, place, say)
    elif checkpoint.verify_resume:
        say(" nothing to verify: the training starts from scratch")
    if checkpoint.save is not None and place.control.is_first and proof.samples is not None:
        log = StepLog(Path(checkpoint.save) / STEPS, state.iteration, proof.run, say)
    return Watch(check, log)


def verify_resume(
    resume: Resume,
    engine: Engine,
    proof: Proof,
    place: Place,
    say: Say,
) -> StepCheck | None:
    """Prove what can be proven before the first step; returns what compares the steps, where some were recorded.

    Raises:
        CheckpointError: the engine does not hold what the checkpoint does, or the loss of the next samples is another.
    """
    control = place.control
    count = verify_state(engine, open_tensors(resume.path), control)
    say(f" verified: {count:,} entries of weights and optimizer state are the checkpoint's, bit for bit")
    verify_samples(resume.training, proof, say)
    recorded: RecordedSteps = control.of_first(
        read_steps(resume.path.parent / STEPS, resume.state.iteration) if control.is_first else None
    )
    if not recorded.steps or not fits(recorded.run, RUN):  # or it is not said what their numbers depend on
        say(" no step after the checkpoint was recorded that could be compared")
        return None
    comparison = compare_runs(recorded.run, proof.run, in_training=True, same_streams=streams_continue(resume, place))
    if comparison.obstacle is not None:
        say(f" the recorded steps after the checkpoint cannot be compared: {comparison.obstacle}")
        return None
    return StepCheck(recorded.steps, comparison, exact_backward=engine.device.type == "cpu", say=say)


def verify_state(engine: Engine, tensors: LogicalTensors, control: Control) -> int:
    """Compare what every rank owns with the files; returns the number of entries.

    Raises:
        CheckpointError: an entry differs; on all ranks.
    """
    count, wrong = 0, []
    for fragment in engine.state_fragments():
        kept = tensors.read_range(
            fragment.name, fragment.kind, fragment.sharding, fragment.start, fragment.tensor.numel()
        )
        held = fragment.tensor.detach().cpu()
        count += held.numel()
        if not torch.equal(held, kept.to(held.dtype)):
            wrong.append(f"{fragment.name} ({fragment.kind})")
    found = control.gather((count, wrong))
    if names := sorted({name for _, names in found for name in names}):
        raise CheckpointError(
            f"--verify-resume: {len(names)} tensors are not what {tensors.folder} says, the first {names[0]}; {WAYS}"
        )
    return sum(count for count, _ in found)


def verify_samples(saved: Mapping[str, Any], proof: Proof, say: Say) -> None:
    """Compare the loss of the next samples with what it was when the checkpoint was saved.

    Raises:
        CheckpointError: it is another one.
    """
    then = saved.get("next_samples")
    if then is None or proof.samples is None:
        say(" the checkpoint tells no loss of the samples that come next")
        return
    comparison = compare_runs(saved["run"], proof.run, in_training=False)
    if comparison.obstacle is not None:
        say(f" the loss of the next samples cannot be compared: {comparison.obstacle}")
        return
    found = proof.samples.measure(then["samples"])
    error = _error(found["loss_sum"], then["loss_sum"])
    bound = comparison.bound if comparison.rounding else 0.0
    what = f"the loss of the next {then['samples']} samples"
    if found["tokens"] != then["tokens"] or not error <= bound:
        raise CheckpointError(
            f"--verify-resume: {what} is {_mean(found)} over {found['tokens']} tokens, and was {_mean(then)} over "
            f"{then['tokens']} when the checkpoint was saved: weights or samples are not the same; {WAYS}"
        )
    how = "bit for bit" if error == 0 else f"within rounding: {error:.1e} (at most {bound:.0e})"
    say(f" verified: {what} is {_mean(found)} as it was when the checkpoint was saved, {how}")


def _error(found: str, expected: str) -> float:
    """Relative difference of two hexadecimal floats; none between two that are spelled alike, such as two `nan`."""
    if found == expected:
        return 0.0
    one, other = float.fromhex(found), float.fromhex(expected)
    return abs(one - other) / abs(other) if other and math.isfinite(other) else math.inf


def _number(text: str) -> str:
    return f"{float.fromhex(text):.9g} ({text})"


def _mean(measured: Mapping[str, Any]) -> str:
    return f"{float.fromhex(measured['loss_sum']) / max(measured['tokens'], 1):.9g}"
