"""Rotary positions: their frequencies, stretched beyond the trained length where asked, and the tables made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.kernels.constant import cached_constant
from megatron.kernels.rotary import apply_rotary


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotation of one model's query and key heads. Hashable: the tables are cached by it."""

    rotated_size: int
    """Channels of a head that are rotated; the rest keep no position."""
    base: float
    interleaved: bool
    table_length: int
    scaling_type: str
    scaling_factor: float
    original_max_positions: int
    low_freq_factor: float
    high_freq_factor: float
    beta_fast: float
    beta_slow: float
    attention_factor: float

    @classmethod
    def from_config(cls, config: ModelConfig) -> Rotary:
        """Read the rotary fields of the section, which must be complete."""
        return cls(
            rotated_size=int(config.kv_channels * config.rotary_percent),
            base=config.rotary_base,
            interleaved=config.rotary_interleaved,
            table_length=config.max_position_embeddings,
            scaling_type=config.rotary_scaling_type,
            scaling_factor=config.rotary_scaling_factor,
            original_max_positions=config.rotary_original_max_positions,
            low_freq_factor=config.rotary_low_freq_factor,
            high_freq_factor=config.rotary_high_freq_factor,
            beta_fast=config.rotary_beta_fast,
            beta_slow=config.rotary_beta_slow,
            attention_factor=config.rotary_attention_factor if config.rotary_scaling_type == "yarn" else 1.0,
        )

    def __call__(self, x_sbnd: Tensor, offset: int = 0, position_ids_bs: Tensor | None = None) -> Tensor:
        """Rotate heads that stand at `position_ids_bs`, or at offset, offset + 1, ... when there are none."""
        needed = offset + x_sbnd.shape[0]
        # Rounded up, so that generating past the table's length makes few tables instead of one a token.
        length = self.table_length if needed <= self.table_length else 1 << (needed - 1).bit_length()
        cos, sin = rotary_tables(self, length, x_sbnd.device)
        if position_ids_bs is None:
            cos, sin = cos[offset:], sin[offset:]
        return apply_rotary(x_sbnd, cos, sin, interleaved=self.interleaved, position_ids_bs=position_ids_bs)


@cached_constant(maxsize=16)
def rotary_tables(rotary: Rotary, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make cosine and sine of position x frequency, fp32 [length, rotated_size / 2]; a cast would round buffers."""
    positions = torch.arange(length, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies(rotary))
    scale = rotary.attention_factor
    return (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)


def frequencies(rotary: Rotary) -> Tensor:
    """Compute the angle per position of each rotated pair of channels, fp32 [rotated_size / 2], fastest first."""
    size, factor = rotary.rotated_size, rotary.scaling_factor
    base = rotary.base
    if rotary.scaling_type == "ntk":
        # "NTK-aware": the base grows so that the slowest pair alone is stretched by the whole factor.
        base *= factor ** (size / (size - 2))
    plain = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    if rotary.scaling_type == "linear":
        return plain / factor
    if rotary.scaling_type == "yarn":
        return _yarn(plain, rotary)
    if rotary.scaling_type == "llama3":
        return _llama3(plain, rotary)
    return plain


def _yarn(plain: Tensor, rotary: Rotary) -> Tensor:
    """Stretch slow pairs, keep fast ones, mix linearly in the pair's index between (Peng et al. 2023, "YaRN", 3.2)."""

    def pair_with_turns(turns: float) -> float:
        """Index of the pair that turns so often over the original length."""
        wavelength = rotary.original_max_positions / turns
        return rotary.rotated_size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rotary.base))

    first = max(math.floor(pair_with_turns(rotary.beta_fast)), 0)
    last = min(math.ceil(pair_with_turns(rotary.beta_slow)), rotary.rotated_size - 1)
    pairs = torch.arange(len(plain), dtype=torch.float32, device="cpu")
    stretched_share = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * (1 - stretched_share) + plain / rotary.scaling_factor * stretched_share


def _llama3(plain: Tensor, rotary: Rotary) -> Tensor:
    """Stretch long wavelengths, keep short ones, mix linearly in the number of turns between (Llama 3.1's rule)."""
    turns = rotary.original_max_positions * plain / (2 * math.pi)
    low, high = rotary.low_freq_factor, rotary.high_freq_factor
    kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept_share + plain / rotary.scaling_factor * (1 - kept_share)
