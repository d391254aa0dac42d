"""Tables of the rotary position embedding: default, llama3 and yarn.

Sources: Su et al. 2021 (arXiv 2104.09864); the Llama 3.1 release for llama3; Peng et al. 2023 (arXiv 2309.00071) for yarn.
Legend: d head width, P positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structcot.model.spec import ModelSpec, RopeSpec


def rotary_tables(spec: ModelSpec, num_positions: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines (P, d), fp32, of positions 0 to `num_positions` - 1; each half of d holds the same angles."""
    frequencies_h = inverse_frequencies(spec.rope, spec.head_dim, device)
    angles_Ph = torch.arange(num_positions, dtype=torch.float32, device=device).unsqueeze(1) * frequencies_h
    angles_Pd = torch.cat((angles_Ph, angles_Ph), dim=-1)
    return angles_Pd.cos() * spec.rope.attention_factor, angles_Pd.sin() * spec.rope.attention_factor


def inverse_frequencies(rope: RopeSpec, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs, fp32."""
    exponents_h = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    plain_h = 1.0 / (rope.theta**exponents_h)
    if rope.kind == "llama3":
        return _llama3(plain_h, rope)
    if rope.kind == "yarn":
        return _yarn(plain_h, rope, head_dim)
    return plain_h


def _llama3(plain_h: Tensor, rope: RopeSpec) -> Tensor:
    """Slow waves are stretched by `factor`, fast ones kept, those between blended."""
    turns_h = rope.original_positions * plain_h / (2 * math.pi)
    blend_h = (turns_h - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend_h = blend_h.clamp(0.0, 1.0)
    return (1 - blend_h) * plain_h / rope.factor + blend_h * plain_h


def _yarn(plain_h: Tensor, rope: RopeSpec, head_dim: int) -> Tensor:
    """Pairs that turn over `beta_fast` times in the original context are kept, under `beta_slow` stretched, those between blended."""

    def pair_of(turns: float) -> float:
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs_h = torch.arange(head_dim // 2, dtype=torch.float32, device=plain_h.device)
    stretched_h = ((pairs_h - low) / (high - low or 0.001)).clamp(0.0, 1.0)
    return plain_h / rope.factor * stretched_h + plain_h * (1 - stretched_h)
