"""The proof that a resumed run is the one that was interrupted (`--verify-resume`).

Three things are compared: what the engine holds with what the checkpoint's files say; the loss of the samples that come
next, without dropout, with what it was when the checkpoint was saved; and each step that the earlier run went on to do
with the same step now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import LogicalTensors, open_tensors
from megatron.data.batch import Batch
from megatron.engine.interface import Engine
from megatron.parallel.groups import Group
from megatron.training.control import Control
from megatron.training.differences import Kind, changed_values, find_differences, listed
from megatron.training.inputs import Lookahead
from megatron.training.resume import Resume, Say
from megatron.training.schedule import Schedule
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


class NextSamples:
    """The loss of the samples that are trained on next, as an evaluation finds it: it draws no random number.

    Args:
        engine: has the weights.
        batches: this rank's, from the next sample on.
        micro_batch_size: samples of a micro-batch.
        data: the ranks that share the samples.
    """

    def __init__(self, engine: Engine, batches: Lookahead, *, micro_batch_size: int, data: Group) -> None:
        self._engine = engine
        self._batches = batches
        self._size = micro_batch_size
        self._data = data

    def measure(self, num_samples: int | None = None) -> dict[str, Any]:
        """Give the sum of the token losses over all ranks, bit for bit, with the number of samples and tokens.

        Args:
            num_samples: how many; None: as many as all ranks take at once. Where they fill no round, the last ones are
                masked, so that every layout measures the same samples.
        """
        at_once = self._size * self._data.size
        num_samples = num_samples or at_once
        rounds = -(-num_samples // at_once)
        batches: Sequence[Batch] = self._batches.peek(rounds)
        if num_samples < rounds * at_once:
            batches = [self._masked(batch, index, num_samples) for index, batch in enumerate(batches)]
        loss_sum, tokens = self._engine.evaluate(batches)
        return {"samples": num_samples, "loss_sum": float(loss_sum).hex(), "tokens": int(tokens)}

    def _masked(self, batch: Batch, index: int, num_samples: int) -> Batch:
        first = (index * self._data.size + self._data.rank) * self._size
        counted = (torch.arange(first, first + self._size, device=batch.labels.device) < num_samples).float()
        mask = torch.ones_like(batch.labels, dtype=torch.float32) if batch.loss_mask is None else batch.loss_mask
        return replace(batch, loss_mask=mask * counted[:, None])


def describe_run(
    sections: Mapping[str, Any], layout: Mapping[str, int], schedule: Schedule, order: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """Say, as JSON, what the numbers of a run's steps depend on."""
    compared = {name: values for name, values in sections.items() if name not in ("checkpoint", "reporting")}
    return {
        "config": compared,
        "layout": dict(layout),
        "schedule": schedule.to_json(),
        "order": dict(order),
        "software": {"torch": torch.__version__, "device": device},
    }


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
    """Takes note of each step: compares it with the recorded one, then records it."""

    def __init__(self, check: StepCheck | None, log: StepLog | None) -> None:
        self._check = check
        self._log = log

    def saw(self, iteration: int, loss: float, grad_norm: float) -> None:
        """Take the numbers of a step; see `StepCheck.saw`."""
        numbers = StepNumbers.of(loss, grad_norm)
        if self._check is not None:
            self._check.saw(iteration, numbers)
        if self._log is not None:
            self._log.write(iteration, numbers)


def verify_resume(
    resume: Resume,
    engine: Engine,
    samples: NextSamples,
    run: Mapping[str, Any],
    control: Control,
    *,
    same_streams: bool,
    say: Say,
) -> StepCheck | None:
    """Prove what can be proven before the first step; returns what compares the steps, where some were recorded.

    Raises:
        CheckpointError: the engine does not hold what the checkpoint does, or the loss of the next samples is another.
    """
    count = verify_state(engine, open_tensors(resume.path), control)
    say(f" verified: {count:,} entries of weights and optimizer state are the checkpoint's, bit for bit")
    verify_samples(resume.training, samples, run, say)
    recorded: RecordedSteps = control.of_first(
        read_steps(resume.path.parent / STEPS, resume.state.iteration) if control.is_first else None
    )
    if not recorded.steps:
        say(" no step after the checkpoint was recorded that could be compared")
        return None
    comparison = compare_runs(recorded.run, run, in_training=True, same_streams=same_streams)
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
        kept = tensors.read_range(fragment.name, fragment.kind, fragment.sharding, fragment.start, fragment.tensor.numel())
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


def verify_samples(saved: Mapping[str, Any], samples: NextSamples, run: Mapping[str, Any], say: Say) -> None:
    """Compare the loss of the next samples with what it was when the checkpoint was saved.

    Raises:
        CheckpointError: it is another one.
    """
    proof = saved.get("next_samples")
    if proof is None:
        say(" the checkpoint tells no loss of the samples that come next")
        return
    comparison = compare_runs(saved["run"], run, in_training=False)
    if comparison.obstacle is not None:
        say(f" the loss of the next samples cannot be compared: {comparison.obstacle}")
        return
    found = samples.measure(proof["samples"])
    error = _error(found["loss_sum"], proof["loss_sum"])
    bound = comparison.bound if comparison.rounding else 0.0
    what = f"the loss of the next {proof['samples']} samples"
    if found["tokens"] != proof["tokens"] or not error <= bound:
        raise CheckpointError(
            f"--verify-resume: {what} is {_mean(found)} over {found['tokens']} tokens, and was {_mean(proof)} over "
            f"{proof['tokens']} when {saved['run']['layout']} saved: weights or samples are not the same; {WAYS}"
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


Facts = Callable[[], Mapping[str, Any]]


def facts_of(run: Mapping[str, Any], vocab_size: int, samples: NextSamples | None) -> Facts:
    """Make what tells a checkpoint of its training; asked by all ranks together at each save."""

    def facts() -> dict[str, Any]:
        proof = {} if samples is None else {"next_samples": samples.measure()}
        return {"training": {"run": run, "vocab_size": vocab_size, **proof}}

    return facts
