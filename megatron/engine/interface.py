"""What the training loop knows of an engine: train a step, evaluate, save, load, close."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from megatron.checkpoint.fragments import Fragment, LogicalTensors


class MicroBatch(Protocol):
    """The samples one rank takes through the model at once; `megatron.data.batch.Batch` is one.

    Shapes: tokens, labels, loss_mask, position_ids and document_ids `[b, s]`, attention_mask `[b, 1, s, s]` (true: may
    attend).
    A loss mask of None counts every token; either all micro-batches of a step have one, on all ranks, or none has.
    """

    @property
    def tokens(self) -> Tensor: ...  # noqa: D102 - the class says what the fields are
    @property
    def labels(self) -> Tensor: ...  # noqa: D102
    @property
    def loss_mask(self) -> Tensor | None: ...  # noqa: D102
    @property
    def position_ids(self) -> Tensor | None: ...  # noqa: D102
    @property
    def attention_mask(self) -> Tensor | None: ...  # noqa: D102
    @property
    def document_ids(self) -> Tensor | None: ...  # noqa: D102

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`; itself when it is there already."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step came to, the same on every rank but for the time.

    Attributes:
        loss: 0-d fp32 tensor on the engine's device, the mean over the step's unmasked tokens of all ranks. Reading it
            on the host waits for the device: do so when it is printed, not every step.
        grad_norm: 0-d fp32 tensor, L2 norm of the gradient of that mean over all parameters, before clipping and
            without loss scale; inf or nan when a gradient is not finite.
        skipped: a gradient was not finite (under fp16: the loss scale was too large), so that parameters and optimizer
            state are unchanged, bit for bit.
        loss_scale: what the loss was multiplied with in this step; 1.0 outside fp16.
        inner_seconds: of this rank's host in DeepSpeed's forward, backward and step, waiting for the device included.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: bool
    loss_scale: float
    inner_seconds: float = 0.0


class Engine(Protocol):
    """A model, its optimizer and the ranks that share them.

    Attributes:
        device: where the model lives.
        module: the bare model, to be read (sizes, names), not to be called during training.
    """

    device: torch.device
    module: nn.Module

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, weight_decay: float) -> StepResult:
        """Take one optimizer step on this rank's micro-batches. Every rank calls it with as many of them.

        The number of micro-batches may change from step to step. Each parameter group learns at
        `learning_rate x lr_mult` and decays at `weight_decay x wd_mult`.

        Raises:
            ValueError: there is no micro-batch.
        """
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Return the sum of token losses and the number of unmasked tokens over all ranks, two 0-d fp64 tensors."""
        ...

    def state_fragments(self) -> Iterator[Fragment]:
        """Give what this rank writes of the weights and of the optimizer's states: views, valid until the next step.

        What all ranks give is the whole model, each entry once.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Give what else a checkpoint has to hold, the same on every rank, for JSON: counts and the loss scale.

        Raises:
            CheckpointError: it cannot be said.
        """
        ...

    def load(self, tensors: LogicalTensors, state: Mapping[str, Any] | None, *, optimizer: bool = True) -> None:
        """Continue from a checkpoint that any layout wrote; called before the first step of a new engine.

        Every rank calls it, and all of them raise when one has a reason to. In the layout that saved, the run
        continues bit for bit. What the settings say (betas, clipping, the loss scale's rules) holds as of this engine;
        the checkpoint brings weights, optimizer state and the current loss scale.

        Args:
            tensors: of the checkpoint.
            state: what `state` gave; not needed for the weights alone.
            optimizer: whether to continue the optimizer's state and the loss scale, too.

        Raises:
            CheckpointError: a tensor is missing, of another shape or another optimizer, or a file is damaged.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds outside its own objects. It cannot be used afterwards."""
        ...
