"""The loss on samples that are not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from megatron.engine.interface import Engine, MicroBatch
from megatron.training.metrics import perplexity


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean loss of the unmasked tokens, in nats a token, over all ranks and samples."""

    lm_loss: float
    tokens: int

    def to_json(self) -> dict[str, float]:
        """Loss, its exponential, and the number of tokens."""
        return {"lm_loss": self.lm_loss, "perplexity": perplexity(self.lm_loss), "tokens": self.tokens}


def evaluate(
    engine: Engine, micro_batches: Iterator[MicroBatch], *, steps: int, micro_batches_per_step: int
) -> Evaluation:
    """Evaluate on the next `steps` global batches. Every rank calls it with its own micro-batches.

    Raises:
        ValueError: there is no unmasked token in them.
    """
    loss_sum, tokens = 0.0, 0
    for _ in range(steps):
        batch: Sequence[MicroBatch] = list(islice(micro_batches, micro_batches_per_step))
        step_loss, step_tokens = engine.evaluate(batch)
        loss_sum += float(step_loss)
        tokens += int(step_tokens)
    if tokens == 0:
        raise ValueError("the evaluation has no token that counts: every one is masked (see --eod-mask-loss)")
    return Evaluation(lm_loss=loss_sum / tokens, tokens=tokens)
