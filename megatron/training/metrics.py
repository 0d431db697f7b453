"""What a report says of the speed and of the steps it covers. Numbers only: nothing here prints or communicates."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron.engine.interface import Engine, StepResult
from megatron.engine.stopwatch import Stopwatch
from megatron.model.gpt import GPT
from megatron.training.state import TrainState

PEAK_TFLOPS_BF16 = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 150.0),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX A6000", 155.0),
    ("RTX 5090", 209.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("MI325X", 1307.0),
    ("MI300X", 1307.0),
    ("MI250X", 191.5),
)
"""Dense bf16/fp16 TFLOP/s with fp32 accumulation of one device, by a part of its name (vendors' data sheets)."""


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Look up a GPU by its name; None for an unknown one, and for fp32, whose peak depends on torch's switches."""
    if precision == "fp32":
        return None
    return next((peak for name, peak in PEAK_TFLOPS_BF16 if name.lower() in device_name.lower()), None)


@dataclass(frozen=True, kw_only=True)
class SpeedModel:
    """What turns samples per second into tokens and FLOPs.

    Attributes:
        tokens_per_sample: the sequence length.
        model_flops_per_sample: forward and backward of one sample, recompute not counted.
        hardware_flops_per_sample: the same with recompute.
        num_devices: ranks that share the work.
        peak_tflops: of one device, or None where it is not known.
    """

    tokens_per_sample: int
    model_flops_per_sample: float
    hardware_flops_per_sample: float
    num_devices: int
    peak_tflops: float | None

    def measure(self, samples: int, seconds: float) -> dict[str, float | None]:
        """Tokens/s of the whole run, TFLOP/s of one device (model and hardware), and MFU in [0, 1]."""
        rate = samples / max(seconds, 1e-9)
        model = rate * self.model_flops_per_sample / self.num_devices / 1e12
        return {
            "tokens_per_second": rate * self.tokens_per_sample,
            "model_tflops": model,
            "hardware_tflops": rate * self.hardware_flops_per_sample / self.num_devices / 1e12,
            "mfu": model / self.peak_tflops if self.peak_tflops else None,
        }


@dataclass
class Interval:
    """The steps since the last report.

    A result is read from the device one step late, when it has long been computed: reading it then waits for nothing.
    Only that of a skipped step is read at once, since the engine has waited for it already.

    Attributes:
        lowest_loss_scale: an overflow at a higher scale is fp16's ordinary search for a scale, no bad result.
        watch: told iteration, loss and gradient norm of each step when it is read.
        last: values of the last step that the schedules gave.
        inner_seconds: of the host in DeepSpeed's calls.
        reading: the host, while it reads results from the device.
    """

    lowest_loss_scale: float = 1.0
    watch: Callable[[int, float, float], None] | None = None
    steps: int = 0
    samples: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norm: float = math.nan
    loss_scale: float = 1.0
    last: dict[str, float] = field(default_factory=dict)
    inner_seconds: float = 0.0
    reading: Stopwatch = field(default_factory=Stopwatch)
    _pending: StepResult | None = None
    _iteration: int = 0

    def add(
        self, result: StepResult, state: TrainState, *, samples: int, learning_rate: float, weight_decay: float
    ) -> None:
        """Take the result of a step, and read that of the step before."""
        self.settle(state)
        self._pending, self._iteration = result, state.iteration
        self.steps += 1
        self.samples += samples
        self.inner_seconds += result.inner_seconds
        self.last = {"learning_rate": learning_rate, "weight_decay": weight_decay, "global_batch_size": samples}
        if result.skipped:
            self.settle(state)

    def settle(self, state: TrainState) -> None:
        """Read the result that is still on the device, and count it in `state` if it is bad."""
        if self._pending is None:
            return
        result, self._pending = self._pending, None
        with self.reading:
            loss, self.grad_norm, self.loss_scale = float(result.loss), float(result.grad_norm), result.loss_scale
        if self.watch is not None:
            self.watch(self._iteration, loss, self.grad_norm)
        searching = result.skipped and result.loss_scale > self.lowest_loss_scale
        bad = not math.isfinite(loss) or not (searching or math.isfinite(self.grad_norm))
        if math.isfinite(loss):
            self.losses.append(loss)
        state.skipped_steps += result.skipped
        state.nonfinite_steps += bad
        state.nonfinite_streak = state.nonfinite_streak + 1 if bad else 0

    def overhead(self, seconds: float) -> float:
        """Of these steps' seconds, those in which the host neither was in DeepSpeed's calls nor read from the device.

        They are what the loop itself costs: the wait for data, schedules, numbers, reports, the question whether to
        stop. A device that has been given enough work ahead does not notice them.
        """
        return max(0.0, seconds - self.inner_seconds - self.reading.seconds)

    def to_json(self) -> dict[str, float]:
        """Give what a report says of the steps: their mean loss (of finite ones), the rest as of the last step."""
        mean = math.fsum(self.losses) / len(self.losses) if self.losses else math.nan
        return {"lm_loss": mean, "grad_norm": self.grad_norm, "loss_scale": self.loss_scale, **self.last}


def memory_gib(engine: Engine) -> float:
    """Most memory held so far: of the GPU, or of this process on a CPU."""
    device, module = engine.device, engine.module
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    recorded = module.peak_bytes() if isinstance(module, GPT) else 0
    return max(recorded, torch.get_device_module(device).max_memory_allocated(device)) / 2**30


def perplexity(loss: float) -> float:
    """`exp(loss)`, and infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
