"""Where the time of a training step goes: some steps of a run under torch's profiler, grouped by kind of work.

On a GPU the pieces are its kernels and copies, each with the operations of the host that started it; a piece counts by
its own name where that says what it is, else by whom it was started by; what neither tells is "other". Idle is what no
piece covers. On a CPU the pieces are torch's operations, which is coarser.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron.config.sections import RunConfig
from megatron.engine.interface import Engine, MicroBatch, StepResult
from megatron.engine.launchers import RankEnvironment
from megatron.training.build import build_trainer
from megatron.training.metrics import SpeedModel
from megatron.training.watched_engine import WatchedEngine

STEP = "megatron::step"
LAUNCH = re.compile(r"cu(?:da)?[A-Z]")

BY_NAME = (
    ("compiled by torch", r"^triton_"),  # whose names list what is fused in them: first, or a part would count as all
    ("collectives", r"nccl|Memcpy PtoP|gloo:|c10d::|all_?reduce|all_?gather|reduce_?scatter"),
    (
        "attention",
        r"sdpa|fmha|flash|cudnn::fusion|(?:query|key_value)_kernel|forward_kernel|scaled_dot|megatron::Softmax",
    ),
    ("into 8 bits", r"megatron::Quantise|find_largest|fp8_quantise"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|aten::(?:add|ba)?b?mm\b|aten::addmm|linear"),
    ("optimizer", r"adam|multi_tensor.*(?:Adam|SGD)|Optimizer\.step"),
    ("gradient norm", r"lp_?norm|norm_?kernel.*multi|multi_tensor.*Norm|NormOps|vector_norm|_foreach_norm"),
    ("norms", r"Tensors<|megatron::Norm|layer_?norm|rms_?norm|GammaBeta|RowwiseMoments"),
    ("heads, rotary", r"megatron::Rotation|split_rotated|join_rotated"),
    ("activation", r"megatron::Activation|gelu|silu|sigmoid"),
    ("dropout and residual sum", r"megatron::Dropout|dropout"),
    ("cross entropy", r"megatron::CrossEntropy|log_softmax|nll_loss|cross_entropy"),
    ("embedding", r"embedding|indexSelect|index_put|gather|scatter|index_elementwise"),
)
"""Kinds and the names of kernels (or, on a CPU, operations) that are theirs; the first that fits counts."""

BY_STARTER = (
    ("optimizer", r"Optimizer\.step"),
    ("gradient norm", r"vector_norm"),
    ("heads, rotary", r"SplitWithSizes|_Heads"),
    ("gradient sums, casts, copies", r"AccumulateGrad"),
    ("norms", r"(?:Layer|RMS|Rms)Norm|layer_norm|rms_norm"),
    ("activation", r"gelu|silu|relu|glu"),
    ("dropout and residual sum", r"dropout"),
    ("cross entropy", r"CrossEntropy|cross_entropy"),
    ("embedding", r"[Ee]mbedding"),
    ("bias and its gradient", r"Addmm|Linear|addmm|linear"),
)
"""The same by the operations that started a kernel whose own name is general, the innermost first."""

BY_OPERATION = (
    ("dropout and residual sum", r"aten::add$"),
    ("gradient sums, casts, copies", r"aten::(?:add_|copy_|to|_to_copy|zero_|fill_|_foreach_\w+)$"),
)
"""The same where nothing else is known: outside of the model these do little but sum gradients."""

REST, IDLE = "other", "idle"


@dataclass(frozen=True)
class Piece:
    """Work on the device.

    Attributes:
        name: of the kernel, or of the operation on a CPU.
        starters: operations that started it, the innermost first.
        begin: microseconds, as `end`.
        own: microseconds that count: on a GPU while no piece that began before is at work, as kernels that come into
            place early wait for the one before; on a CPU without the operations inside.
    """

    name: str
    starters: tuple[str, ...]
    begin: float
    end: float
    own: float

    @property
    def kind(self) -> str:
        """Which kind of work it is."""
        for kind, pattern in BY_NAME:
            if re.search(pattern, self.name):
                return kind
        for table in (BY_STARTER, BY_OPERATION):
            for starter in self.starters:
                for kind, pattern in table:
                    if re.search(pattern, starter):
                        return kind
        return REST


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """What the steps of a run took.

    Attributes:
        step_ms: of one step, on the clock and without the profiler.
        profiled_ms: of one step under the profiler.
        kinds_ms: of one step, by kind, the largest first; with idle they add up to `profiled_ms` on a GPU.
        kernels: of one step, name and milliseconds and starters of the dearest pieces, by kind.
        gaps: of one step, where nothing was at work for the longest: milliseconds, how often, before which piece.
        tokens_per_second: of one rank's step without the profiler, and model TFLOP/s and MFU below, None if unknown.
    """

    device: str
    step_ms: float
    profiled_ms: float
    kinds_ms: dict[str, float]
    kernels: list[dict[str, Any]]
    gaps: list[dict[str, Any]]
    speed: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))


def profile_steps(config: RunConfig, environment: RankEnvironment, *, warm_up: int, steps: int) -> StepProfile:
    """Train `warm_up` steps, `steps` on the clock, and as many under the profiler; every rank calls it.

    Raises:
        UserError: the run cannot be built.
    """
    config = replace(
        config,
        training=replace(config.training, train_iters=warm_up + 2 * steps, eval_iters=0),
        checkpoint=replace(config.checkpoint, save=None, save_interval=None),
    )
    trainer = build_trainer(config, environment)
    trainer.engine = watched = _ProfiledEngine(trainer.engine, warm_up, steps)
    samples = trainer.plan.batch_size.final
    trainer.fit()
    return watched.result(trainer.plan.speed, samples)


class _ProfiledEngine(WatchedEngine):
    """An engine whose steps are first waited for, then timed, then profiled."""

    def __init__(self, engine: Engine, warm_up: int, steps: int) -> None:
        super().__init__(engine)
        self._warm_up, self._steps, self._done = warm_up, steps, 0
        self._marks: list[float] = []
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, weight_decay: float) -> StepResult:
        """See `Engine.train_step`."""
        if self._done in (self._warm_up, self._warm_up + self._steps):
            self._mark()
        if self._done == self._warm_up + self._steps:
            self._profiler.start()
            self._mark()
        with torch.profiler.record_function(STEP):
            result = super().train_step(micro_batches, learning_rate, weight_decay)
        self._done += 1
        if self._done == self._warm_up + 2 * self._steps:
            self._mark()
            self._profiler.stop()
        return result

    def result(self, speed: SpeedModel, samples: int) -> StepProfile:
        """Sum up what was seen."""
        timed, _, begin, end = (self._marks[0], *self._marks[1:])
        seconds = (self._marks[1] - timed) / self._steps
        profiled = 1e3 * (end - begin) / self._steps
        pieces = list(_pieces(self._profiler, self.device.type))
        kinds = _by_kind(pieces, self._steps)
        kinds[IDLE] = max(0.0, profiled - _covered(pieces) / 1e3 / self._steps)
        return StepProfile(
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            step_ms=1e3 * seconds,
            profiled_ms=profiled,
            kinds_ms=kinds,
            kernels=_dearest(pieces, self._steps),
            gaps=_gaps(pieces, self._steps),
            speed=speed.measure(samples, seconds),
        )

    def _mark(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._marks.append(time.perf_counter())


def _pieces(profiler: profile, device_type: str) -> Iterator[Piece]:
    events = profiler.events()
    if events is None:
        return
    if device_type != "cuda":
        for event in events:
            if event.name not in (STEP, "ProfilerStep*") and event.self_cpu_time_total > 0:
                span = event.time_range
                starters = tuple(_starters(event.cpu_parent))
                yield Piece(event.name, starters, span.start, span.end, event.self_cpu_time_total)
        return
    # A kernel has the number of the call of CUDA that launched it, which stands among the host's operations.
    launches = {
        event.id: event
        for event in events
        if event.device_type == DeviceType.CPU and LAUNCH.match(event.name) is not None
    }
    # What a user annotates on the host is repeated as a span on the device: that is no work. Names of the host's other
    # operations do not tell: one that launches a kernel compiled by torch has the kernel's name.
    annotations = {event.name for event in events if event.is_user_annotation}
    work = [event for event in events if event.device_type == DeviceType.CUDA and event.name not in annotations]
    reached = float("-inf")
    for event in sorted(work, key=lambda event: event.time_range.start):
        span, launch = event.time_range, launches.get(event.id)
        starters = () if launch is None else tuple(_starters(launch.cpu_parent))
        yield Piece(event.name, starters, span.start, span.end, max(0.0, span.end - max(span.start, reached)))
        reached = max(reached, span.end)


def _starters(event: Any) -> Iterator[str]:
    while event is not None:
        if event.name != STEP:
            yield event.name
        event = event.cpu_parent


def _by_kind(pieces: Iterable[Piece], steps: int) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for piece in pieces:
        sums[piece.kind] += piece.own / 1e3 / steps
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _covered(pieces: Iterable[Piece]) -> float:
    """Microseconds in which at least one piece was at work."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted((piece.begin, piece.end) for piece in pieces):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _dearest(pieces: Iterable[Piece], steps: int, count: int = 60) -> list[dict[str, Any]]:
    """Sum pieces of one name and one direct starter, and keep the dearest."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for piece in pieces:
        entry = sums[piece.kind, piece.name, " < ".join(piece.starters[:3])]
        entry[0] += piece.own / 1e3 / steps
        entry[1] += 1 / steps
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])[:count]
    return [
        {"kind": kind, "name": name, "started_by": starter, "ms": ms, "calls": calls}
        for (kind, name, starter), (ms, calls) in ordered
    ]


def _gaps(pieces: Iterable[Piece], steps: int, count: int = 20) -> list[dict[str, Any]]:
    """Sum the idle times before pieces of one name and starter, and keep the longest."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    reached = float("inf")
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        if piece.begin > reached:
            entry = sums[piece.name, " < ".join(piece.starters[:3])]
            entry[0] += (piece.begin - reached) / 1e3 / steps
            entry[1] += 1 / steps
        reached = piece.end if reached == float("inf") else max(reached, piece.end)
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])[:count]
    return [
        {"before": name, "started_by": starter, "ms": ms, "times": times} for (name, starter), (ms, times) in ordered
    ]
