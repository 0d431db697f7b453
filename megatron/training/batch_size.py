"""The global batch size as a pure function of consumed samples (Megatron-LM's ramp-up)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.training.state import TrainState, Unit


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """A global batch that grows from `start` to `final` by `increment`, evenly over `ramp_samples` samples."""

    final: int
    start: int
    increment: int
    ramp_samples: int

    @classmethod
    def constant(cls, size: int) -> BatchSize:
        """Make one that never changes."""
        return cls(final=size, start=size, increment=1, ramp_samples=0)

    @classmethod
    def ramped(cls, size: int, ramp: tuple[int, ...]) -> BatchSize:
        """Follow `--rampup-batch-size START INCREMENT SAMPLES`; constant when `ramp` is empty."""
        if not ramp:
            return cls.constant(size)
        start, increment, samples = ramp
        return cls(final=size, start=start, increment=increment, ramp_samples=samples)

    def at(self, consumed_samples: int) -> int:
        """Give the samples of the step that starts after `consumed_samples`."""
        increments = (self.final - self.start) // self.increment
        if increments == 0 or self.ramp_samples == 0 or consumed_samples > self.ramp_samples:
            return self.final
        return self.start + int(consumed_samples / (self.ramp_samples / increments)) * self.increment

    def samples_of(self, iterations: int, consumed: int = 0) -> int:
        """Count the samples that the next `iterations` steps consume, after `consumed` ones."""
        samples, done = consumed, 0
        while done < iterations and self.at(samples) < self.final:
            samples += self.at(samples)
            done += 1
        return samples - consumed + (iterations - done) * self.final

    def iterations_of(self, samples: int, consumed: int = 0) -> int:
        """Count the steps until at least `samples` are consumed, after `consumed` ones."""
        done = 0
        while consumed < samples and self.at(consumed) < self.final:
            consumed += self.at(consumed)
            done += 1
        return done - (consumed - samples) // self.final if consumed < samples else done


def steps_left(limits: Mapping[Unit, int], batch_size: BatchSize, seq_length: int, state: TrainState) -> int | None:
    """Count the steps from `state` to the first of the limits; None without any.

    Args:
        limits: of the whole training, by unit.
        batch_size: of each step.
        seq_length: tokens of a sample, from here on.
        state: what was done before.
    """
    left = {unit: max(limit - state.progress(unit), 0) for unit, limit in limits.items()}
    if "tokens" in left:
        left["tokens"] = -(-left["tokens"] // seq_length)
    return min(
        (
            count
            if unit == "iterations"
            else batch_size.iterations_of(count + state.consumed_samples, state.consumed_samples)
            for unit, count in left.items()
        ),
        default=None,
    )
