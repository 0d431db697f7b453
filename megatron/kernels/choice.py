"""Which implementation computes each operation of a model: chosen once, handed to the model, printed at the start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.config.kernels import KernelsConfig
from megatron.kernels.activation import ACTIVATIONS, FUSED_ACTIVATIONS, Activation
from megatron.kernels.build import KernelBuildError, load_kernels
from megatron.kernels.cross_entropy import FusedSoftmax
from megatron.kernels.dropout import dropout_add, fused_dropout_add
from megatron.kernels.fp8_products import choose_fp8
from megatron.kernels.norm import add_norm, fused_add_norm, fused_norm, fused_stream_norm, norm, stream_norm
from megatron.kernels.rotary import (
    apply_rotary,
    fused_heads,
    fused_rotary,
    fused_split,
    split_heads,
    split_rotary,
)
from megatron.kernels.softmax import fused_scaled_softmax, scaled_softmax

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One function an operation; the defaults are plain torch and run everywhere."""

    norm: Callable[..., Any] = norm
    stream_norm: Callable[..., Any] = stream_norm
    add_norm: Callable[..., Any] = add_norm
    rotary: Callable[..., Any] = apply_rotary
    split_rotary: Callable[..., Any] = split_rotary
    split_heads: Callable[..., Any] = split_heads
    activations: Mapping[str, Activation] = field(default_factory=lambda: ACTIVATIONS)
    adds_bias: bool = False
    """Whether the activation should add the bias of the product before it; a product does it as well as plain torch."""
    dropout_add: Callable[..., Any] = dropout_add
    drops_by_place: bool = False
    """Whether dropout takes the place of its tensor in one that ranks share, and draws the mask of that."""
    scaled_softmax: Callable[..., Any] = scaled_softmax
    """Of attention that is written out."""
    softmax: FusedSoftmax | None = None
    """Passes over the logits of the cross entropy; None: those in plain torch."""
    products: Any = None
    """The blocks' matrix products, a `megatron.parallel.products.Products`; None: torch's own."""

    @property
    def are_fused(self) -> bool:
        """Whether operations between the products are."""
        return self != replace(PLAIN, products=self.products)


PLAIN = Kernels()

FUSED: dict[str, dict[str, Any]] = {
    "norm": {"norm": fused_norm, "stream_norm": fused_stream_norm, "add_norm": fused_add_norm},
    "rotary": {"rotary": fused_rotary, "split_rotary": fused_split, "split_heads": fused_heads},
    "activation": {"activations": FUSED_ACTIVATIONS, "adds_bias": True},
    "dropout": {"dropout_add": fused_dropout_add, "drops_by_place": True},
    "softmax": {"scaled_softmax": fused_scaled_softmax},
    "cross_entropy": {"softmax": FusedSoftmax()},
}
"""What each kernel, a folder of `csrc`, replaces."""


def choose_kernels(config: KernelsConfig, device_type: str) -> tuple[Kernels, str]:
    """Return the implementations for a run and the reason for them, half a sentence to print at start.

    On a GPU the kernels are compiled now if this host never did.

    Raises:
        ConfigError: the GPU cannot do what the flags say.
    """
    kernels, reason = _choose_fused(config, device_type)
    if not config.fp8:
        return kernels, reason
    products, said = choose_fp8(config, device_type)
    return replace(kernels, products=products), f"{reason}; {said}"


def _choose_fused(config: KernelsConfig, device_type: str) -> tuple[Kernels, str]:
    """Return what is computed between the products, and why by these."""
    if device_type != "cuda":
        return PLAIN, f"plain torch, on {device_type}"
    unwanted = _unwanted(config)
    wanted = [name for name in FUSED if name not in unwanted]
    if not wanted:
        return PLAIN, "plain torch, as the flags say"
    try:
        load_kernels(wanted)
    except KernelBuildError as error:
        log.warning("kernels: plain torch, since %s", error)
        return PLAIN, f"plain torch, since {error}"
    kernels = PLAIN
    for name in wanted:
        kernels = replace(kernels, **FUSED[name])
    return kernels, f"fused {', '.join(wanted)}" + (f"; plain torch for {', '.join(unwanted)}" if unwanted else "")


def _unwanted(config: KernelsConfig) -> list[str]:
    """Name the kernels that flags leave out."""
    left_out = {
        "norm": config.no_norm_fusion,
        "rotary": config.no_rope_fusion,
        "activation": config.no_bias_gelu_fusion,
        "dropout": config.no_bias_dropout_fusion,
        "softmax": config.no_masked_softmax_fusion,
        "cross_entropy": config.no_cross_entropy_loss_fusion,
    }
    return [name for name, is_left_out in left_out.items() if is_left_out or config.no_fused_kernels]
