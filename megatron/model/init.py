"""Initial weights, drawn by logical tensor: every layout of the same seed starts from the same full weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron.parallel.sharding import InitKind, Sharding, init_of, sharding_of, slice_of


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int, std: float, num_layers: int) -> None:
    """Fill every parameter with its rank's slice of the logical tensor.

    Args:
        model: its layers have marked each parameter with its sharding and its kind of start.
        seed: with a parameter's name it decides the values, whatever else the model holds and however it is laid out.
        std: of "normal"; "scaled_normal", the products that write into the residual stream, have std / sqrt(2 x layers)
            so that the stream's variance does not grow with depth (Radford et al. 2019, GPT-2).
        num_layers: blocks of the whole model.

    Raises:
        ValueError: a parameter does not say how it starts.
    """
    for name, param in model.named_parameters():
        param.copy_(_draw(name, param, param.device, seed=seed, std=std, num_layers=num_layers))


@torch.no_grad()
def draw_parameters(
    model: nn.Module, device: torch.device, seed: int, std: float, num_layers: int
) -> Iterator[tuple[str, Tensor]]:
    """Give each parameter's name and its rank's slice of the logical tensor, one at a time: for a model on "meta".

    Args:
        model: as for `initialize_parameters`, which gives the same values.
        device: where the values are drawn, and are.
        seed: as there.
        std: as there.
        num_layers: as there.

    Raises:
        ValueError: a parameter does not say how it starts.
    """
    for name, param in list(model.named_parameters()):
        yield name, _draw(name, param, device, seed=seed, std=std, num_layers=num_layers)


def _draw(name: str, param: nn.Parameter, device: torch.device, *, seed: int, std: float, num_layers: int) -> Tensor:
    sharding = sharding_of(param)
    logical = draw_logical(name, init_of(param), sharding, device, seed=seed, std=std, num_layers=num_layers)
    return slice_of(logical, sharding)


def draw_logical(
    name: str, kind: InitKind, sharding: Sharding, device: torch.device, *, seed: int, std: float, num_layers: int
) -> Tensor:
    """Make the whole initial tensor of one parameter, fp32. Its padding is zero and takes no random number."""
    logical = torch.zeros(sharding.logical_shape, device=device)
    held = logical if sharding.dim is None else logical.narrow(sharding.dim, 0, _held_size(sharding))
    if kind == "ones":
        held.fill_(1.0)
    elif kind != "zeros":
        scale = 1 / math.sqrt(2 * num_layers) if kind == "scaled_normal" else 1.0
        generator = torch.Generator(device).manual_seed(_seed_of(seed, name))
        held.normal_(generator=generator).mul_(std * scale)  # in place: a large table is in memory once
    return logical


def _held_size(sharding: Sharding) -> int:
    """Count the entries along the sharded dim that are not padding."""
    return sharding.logical_shape[sharding.dim or 0] - sharding.padding


def _seed_of(seed: int, name: str) -> int:
    """Derive 63 bits that depend on nothing but the run's seed and the parameter's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1
