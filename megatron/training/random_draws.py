"""Which dropout masks the ranks of a layout draw: the same where they hold the same, others where they do not.

Hidden states that all tensor ranks hold must be dropped alike on them; shards of the sequence, heads, and the samples
and tokens of other replicas must be dropped apart. A mask that is drawn twice makes a run that looks healthy and
learns from less noise than one rank's; masks that differ on copies make the copies drift.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron.model.attention import Attention
from megatron.model.dropout import HiddenDropout
from megatron.parallel.mesh import AXES, Coordinates
from megatron.parallel.ulysses import UlyssesAttention
from megatron.training.certificate import Finding, describe_place


@dataclass
class Draws:
    """What one rank drew: for each module that drops, a print of every mask in the order of drawing.

    Attributes:
        attention: by name of the attention module.
        hidden: by name of the hidden states' dropout.
    """

    coordinates: Coordinates
    attention: dict[str, list[Tensor]] = field(default_factory=dict)
    hidden: dict[str, list[Tensor]] = field(default_factory=dict)

    def watch(self, module: nn.Module) -> None:
        """Have every module that drops note its masks from now on."""
        for name, part in module.named_modules():
            if isinstance(part, HiddenDropout) and part.probability:
                part.register_forward_hook(_noting_zeros(self.hidden.setdefault(name, [])))
            if isinstance(part, Attention) and part.dropout:
                attend = part.attend
                prints = self.attention.setdefault(name, [])
                if isinstance(attend, UlyssesAttention):  # its inner function draws the mask of this rank's heads
                    part.attend = UlyssesAttention(_noting_weights(attend.attend, prints), attend.group)
                else:
                    part.attend = _noting_weights(attend, prints)


def compare_draws(draws: Sequence[Draws], *, precision: str, sequence_parallel: bool) -> Iterator[Finding]:
    """Check every pair of ranks that hold the same modules, and every pair of one rank's own masks."""
    places = [drawn.coordinates for drawn in draws]
    for kind, split_over_tensor in (("attention", True), ("hidden", sequence_parallel)):
        for name in sorted({name for drawn in draws for name in getattr(drawn, kind)}):
            masks = {drawn.coordinates: getattr(drawn, kind)[name] for drawn in draws if name in getattr(drawn, kind)}
            wrong = [*_wrong_alone(masks, places), *_wrong_pairs(masks, places, split_over_tensor)]
            yield Finding(
                precision=precision,
                what="random stream",
                name=name,
                error=float(len(wrong)),
                bound=0.0,
                where=wrong[0] if wrong else "",
            )


def _wrong_alone(masks: Mapping[Coordinates, list[Tensor]], places: Sequence[Coordinates]) -> Iterator[str]:
    for place, drawn in masks.items():
        if not drawn:
            yield f"{describe_place(place, places)} draws no mask"
        if any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2)):
            yield f"{describe_place(place, places)} draws a mask twice"


def _wrong_pairs(
    masks: Mapping[Coordinates, list[Tensor]], places: Sequence[Coordinates], split_over_tensor: bool
) -> Iterator[str]:
    for one, other in itertools.combinations(masks, 2):
        axes = [axis for axis, a, b in zip(AXES, one, other, strict=True) if a != b]
        if "pipeline" in axes:  # a layer that two stages share
            continue
        apart = axes != ["tensor"] or split_over_tensor
        equal = [torch.equal(mask, twin) for mask, twin in zip(masks[one], masks[other], strict=True)]
        if any(equal) if apart else not all(equal):
            told = "draw the same mask" if apart else "draw different masks for the same values"
            yield f"{describe_place(one, places)} and {describe_place(other, places)} {told}"


def _noting_zeros(masks: list[Tensor]) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        stream = inputs[1] if len(inputs) > 1 and inputs[1] is not None else 0.0  # what is left may be added to
        masks.append((output.detach() == stream).cpu())

    return note


def _noting_weights(attend: Callable[..., Tensor], prints: list[Tensor]) -> Callable[..., Tensor]:
    """Attend once more, before the real call and from the same random state, to values that show the mask."""

    def noting(query_sbnd: Tensor, key_sbkd: Tensor, value_sbkd: Tensor, **options: Any) -> Tensor:
        shape = value_sbkd.shape
        # One column of the weights a channel would need as many channels as tokens; a print needs different values.
        values = torch.linspace(0.5, 1.5, shape[0] * shape[3], device=value_sbkd.device).view(shape[0], 1, 1, shape[3])
        probe = values.to(value_sbkd.dtype).expand(shape).contiguous()
        with torch.no_grad(), torch.random.fork_rng(_devices(value_sbkd)):
            shown = attend(torch.zeros_like(query_sbnd), torch.zeros_like(key_sbkd), probe, **options)
        prints.append(shown.cpu())
        return attend(query_sbnd, key_sbkd, value_sbkd, **options)

    return noting


def _devices(tensor: Tensor) -> list[int]:
    return [] if tensor.device.index is None else [tensor.device.index]
