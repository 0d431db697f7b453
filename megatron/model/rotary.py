"""Rotary positions: their frequencies, stretched beyond the trained length where asked, and the tables made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.kernels.constant import cached_constant


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotation of one model's query and key heads."""

    frequencies: tuple[float, ...]
    """Angle per position of each rotated pair of channels; channels after those pairs keep no position."""
    scale: float
    """Factor on the tables."""
    interleaved: bool
    table_length: int
    kernels: Kernels = PLAIN
    """What computes it."""

    @classmethod
    def from_config(cls, config: ModelConfig, kernels: Kernels = PLAIN) -> Rotary:
        """Read the rotary fields of the section, which must be complete."""
        return cls(
            frequencies=tuple(rotary_frequencies(config).tolist()),
            scale=config.rotary_attention_factor if config.rotary_scaling_type == "yarn" else 1.0,
            interleaved=config.rotary_interleaved,
            table_length=config.max_position_embeddings,
            kernels=kernels,
        )

    def __call__(self, x_sbnd: Tensor, offset: int = 0, position_ids_bs: Tensor | None = None) -> Tensor:
        """Rotate heads that stand at `position_ids_bs`, or at offset, offset + 1, ... when there are none."""
        where = self._where(x_sbnd, offset, position_ids_bs)
        rotated: Tensor = self.kernels.rotary(x_sbnd, **where)
        return rotated

    def split(
        self,
        product_sbc: Tensor,
        groups: int,
        head_size: int,
        offset: int = 0,
        position_ids_bs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cut a product [s, b, groups x [queries; key; value]] into its heads and rotate the queries and keys."""
        where = self._where(product_sbc, offset, position_ids_bs)
        query, key, value = self.kernels.split_rotary(product_sbc, groups=groups, head_size=head_size, **where)
        return query, key, value

    def _where(self, x: Tensor, offset: int, position_ids_bs: Tensor | None) -> dict[str, Any]:
        """Find the rows of the tables for x, [s, b, ...]."""
        needed = offset + x.shape[0]
        # Rounded up, so that generating past the table's length makes few tables instead of one a token.
        length = self.table_length if needed <= self.table_length else 1 << (needed - 1).bit_length()
        cos, sin = rotary_tables(self.frequencies, self.scale, length, x.device)
        if position_ids_bs is None and offset:
            cos, sin = cos[offset:], sin[offset:]
        return {"cos_pr": cos, "sin_pr": sin, "interleaved": self.interleaved, "position_ids_bs": position_ids_bs}


@cached_constant(maxsize=16)
def rotary_tables(
    frequencies: tuple[float, ...], scale: float, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Make cosine and sine of position x frequency, fp32 [length, pairs]; a cast of the model would round buffers.

    The angles are fp64: an angle near a million radians is rounded by 0.03 in fp32.
    """
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, torch.tensor(frequencies, dtype=torch.float64, device="cpu"))
    return (angles.cos() * scale).float().to(device), (angles.sin() * scale).float().to(device)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Compute the angle per position of each rotated pair of channels, fp64 [pairs], fastest first."""
    size, base, factor = (
        int(config.kv_channels * config.rotary_percent),
        config.rotary_base,
        config.rotary_scaling_factor,
    )
    if config.rotary_scaling_type == "ntk":
        # "NTK-aware": the base grows so that the slowest pair alone is stretched by the whole factor.
        base *= factor ** (size / (size - 2))
    plain = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
    if config.rotary_scaling_type == "linear":
        return plain / factor
    if config.rotary_scaling_type == "yarn":
        return _yarn(plain, config)
    if config.rotary_scaling_type == "llama3":
        return _llama3(plain, config)
    return plain


def _yarn(plain: Tensor, config: ModelConfig) -> Tensor:
    """Stretch slow pairs, keep fast ones, mix linearly in the pair's index between (Peng et al. 2023, "YaRN", 3.2)."""
    size = 2 * len(plain)

    def pair_with_turns(turns: float) -> float:
        """Index of the pair that turns so often over the original length."""
        wavelength = config.rotary_original_max_positions / turns
        return size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rotary_base))

    first = max(math.floor(pair_with_turns(config.rotary_beta_fast)), 0)
    last = min(math.ceil(pair_with_turns(config.rotary_beta_slow)), size - 1)
    pairs = torch.arange(len(plain), dtype=torch.float64, device="cpu")
    stretched_share = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * (1 - stretched_share) + plain / config.rotary_scaling_factor * stretched_share


def _llama3(plain: Tensor, config: ModelConfig) -> Tensor:
    """Stretch long wavelengths, keep short ones, mix linearly in the number of turns between (Llama 3.1's rule)."""
    turns = config.rotary_original_max_positions * plain / (2 * math.pi)
    low, high = config.rotary_low_freq_factor, config.rotary_high_freq_factor
    kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept_share + plain / config.rotary_scaling_factor * (1 - kept_share)
