"""The kernel of rotary positions. Legend: T tokens, H heads, d head width, P positions."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from structcot_kernels.launch import cdiv, launch, power_of_2

TILE_ELEMENTS = 4096
"""Elements of heads that a program turns."""


def forward(heads_THd: Tensor, positions_T: Tensor, cos_Pd: Tensor, sin_Pd: Tensor, inverse: bool) -> Tensor:
    """Heads turned, contiguous."""
    num_tokens, num_heads, width = heads_THd.shape
    out_THd = heads_THd.new_empty(heads_THd.shape)
    tile = tile_of(num_heads, width)
    launch(
        rope_kernel,
        (cdiv(num_tokens, tile["BLOCK_T"]), cdiv(num_heads, tile["BLOCK_H"])),
        heads_THd,
        positions_T,
        cos_Pd,
        sin_Pd,
        out_THd,
        num_tokens,
        num_heads,
        cos_Pd.shape[0],
        width,
        heads_THd.stride(0),
        INVERSE=inverse,
        **tile,
    )
    return out_THd


def tile_of(num_heads: int, width: int) -> dict[str, int]:
    """Tokens, heads and pairs of a program's tile, and its warps: all heads of a token if they fit, of many tokens if they are small."""
    block_d = power_of_2(width // 2)
    block_h = min(power_of_2(num_heads), max(1, TILE_ELEMENTS // block_d))
    return {"BLOCK_T": max(1, TILE_ELEMENTS // (block_h * block_d)), "BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": 8}


@triton.jit
def rope_kernel(
    heads_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_tokens,
    num_heads,
    num_positions,
    width,
    heads_stride,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_T tokens and BLOCK_H heads."""
    half = width // 2
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    pairs = tl.arange(0, BLOCK_D)[None, None, :]
    inside = (tokens < num_tokens) & (heads < num_heads) & (pairs < half)
    positions = tl.load(positions_ptr + tokens, mask=tokens < num_tokens, other=0)
    in_table = (positions >= 0) & (positions < num_positions) & (tokens < num_tokens) & (pairs < half)
    cos = tl.load(cos_ptr + positions * width + pairs, mask=in_table, other=float("nan"))
    sin = tl.load(sin_ptr + positions * width + pairs, mask=in_table, other=0.0)
    if INVERSE:
        sin = -sin
    first_offsets = tokens * heads_stride + heads * width + pairs
    first = tl.load(heads_ptr + first_offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads_ptr + first_offsets + half, mask=inside, other=0.0).to(tl.float32)
    out_offsets = tokens * num_heads * width + heads * width + pairs
    tl.store(out_ptr + out_offsets, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + out_offsets + half, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)
