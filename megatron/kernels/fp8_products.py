"""The three products of a linear layer in 8 bits.

Inputs and weights are E4M3. Gradients of outputs are E5M2 under the format "hybrid", for their range, and E4M3 under
"e4m3", for its digit more. Sums of forward stay in the matrix unit, which keeps fewer digits of them than fp32 has;
those of backward are handed over to fp32 every so often: the weights' gradients sum over all tokens.

The functions fit `megatron.parallel.products.Products`; their results are bf16.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron.config.errors import ConfigError
from megatron.config.kernels import KernelsConfig
from megatron.kernels.build import KernelBuildError, load_kernel
from megatron.kernels.fp8 import E4M3, E5M2, Quantised, fused_quantise, quantise

log = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 9)
GRADIENT_FORMATS = {"hybrid": E5M2, "e4m3": E4M3}
RESULT = torch.bfloat16


class Fp8Products:
    """Products of matrices in 8 bits with a scale each.

    Args:
        gradient_format: of the gradients: a key of `GRADIENT_FORMATS`.
        quantise: brings matrices into 8 bits: plain torch or fused.
    """

    def __init__(self, gradient_format: str = "hybrid", quantise: Callable[..., Quantised] = quantise) -> None:
        self._gradients = GRADIENT_FORMATS[gradient_format]
        self._quantise = quantise
        self._held: dict[int, tuple[Tensor, Quantised]] | None = None

    @contextmanager
    def weights_stay(self) -> Iterator[None]:
        """Within the context no weight changes or moves: each is brought into 8 bits once."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def of_input(self, input: Tensor, *, for_output: bool = True, for_weight: bool = True) -> Quantised:
        """Bring an input [n, i] into 8 bits."""
        return self._quantise(input, E4M3, by_row=for_output, by_column=for_weight)

    def of_weight(self, weight: Tensor, *, for_output: bool = True, for_input: bool = True) -> Quantised:
        """Bring a weight [o, i] into 8 bits, or return it as it was brought before."""
        weight = weight.detach()
        if self._held is None:
            return self._quantise(weight, E4M3, by_row=for_output, by_column=for_input)
        # By address, since recompute is handed other objects for the same weight; the weight is held along, so that
        # its address cannot become that of another.
        address = weight.data_ptr()
        if address not in self._held:
            self._held[address] = (weight, self._quantise(weight, E4M3))
        return self._held[address][1]

    def of_gradient(
        self, grad: Tensor, *, for_weight: bool = True, sums: bool = False
    ) -> tuple[Quantised, Tensor | None]:
        """Bring the gradient of an output [n, o] into 8 bits, and sum it over its rows as it was."""
        made = self._quantise(grad, self._gradients, by_column=for_weight, sums=sums)
        return made, made.sums

    def keep(self, input: Quantised) -> Quantised:
        """Leave the transposed copy: one byte a number, where torch keeps two."""
        return input._replace(by_row=None)

    def output(self, input: Quantised, weight: Quantised, bias: Tensor | None) -> Tensor:
        """[n, o], the bias added before it is rounded."""
        return _multiply(input.by_row, weight.by_row, input, weight, bias, is_forward=True)

    def input_gradient(self, grad: Quantised, weight: Quantised) -> Tensor:
        """[n, i]."""
        return _multiply(grad.by_row, weight.by_column, grad, weight)

    def weight_gradient(self, grad: Quantised, input: Quantised) -> Tensor:
        """[o, i]."""
        grad, input = Quantised(*grad), Quantised(*input)
        return _multiply(grad.by_column, input.by_column, grad, input)


def choose_fp8(config: KernelsConfig, device_type: str) -> tuple[Fp8Products, str]:
    """Return the products of a run with --fp8, and a few words on them to print at start.

    Raises:
        ConfigError: the GPU has no units for them.
    """
    gradient_format = config.fp8_format or "hybrid"
    said = f"products of the blocks in fp8 ({gradient_format})"
    if device_type != "cuda":
        return Fp8Products(gradient_format), f"{said}, emulated on {device_type}"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise ConfigError(
            [
                f"--fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and "
                f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}: leave --fp8 out."
            ]
        )
    if config.no_fused_kernels:
        return Fp8Products(gradient_format), f"{said}, brought into it by plain torch, as the flags say"
    try:
        load_kernel("fp8")
    except KernelBuildError as error:
        log.warning("fp8: brought into 8 bits by plain torch, since %s", error)
        return Fp8Products(gradient_format), f"{said}, brought into it by plain torch, since {error}"
    return Fp8Products(gradient_format, fused_quantise), said


def _multiply(
    a: Tensor | None,
    b: Tensor | None,
    scaled_a: Quantised,
    scaled_b: Quantised,
    bias: Tensor | None = None,
    *,
    is_forward: bool = False,
) -> Tensor:
    """Return a b^T, times both scales, for copies [n, k] and [m, k] of two matrices."""
    if a is None or b is None:
        raise ValueError("a matrix was not brought into 8 bits for this product")
    if a.device.type == "cpu":  # torch's own rounds sums of 8-bit numbers in ways of its own there
        exact = (a.float() @ b.float().t()) * (scaled_a.scale * scaled_b.scale)
        return (exact if bias is None else exact + bias.float()).to(RESULT)
    return torch._scaled_mm(
        a,
        b.t(),
        scale_a=scaled_a.scale,
        scale_b=scaled_b.scale,
        bias=bias,
        out_dtype=RESULT,
        use_fast_accum=is_forward,
    )
