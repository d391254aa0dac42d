"""Kernels of the low-rank products: S = drop(x) A^T, y = start + bias + scale drop'(S B^T), and the gradients of A and B.

Ranks are padded inside to blocks of 16, 32, 64 or 128 and walked over, so every rank goes. Dropped inputs are found anew from each token's
key wherever they are needed; no mask is ever stored. Legend: T tokens, K inputs, N outputs, R rank, P chunks of tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from structcot_kernels.launch import cdiv, chunks_for, launch, power_of_2


def down(x_TK: Tensor, a_RK: Tensor, dropout: float, keys_T: Tensor) -> Tensor:
    """S (T, R) of an input with dropout, x read once for every 128 ranks."""
    (num_rows, inner), rank = x_TK.shape, a_RK.shape[0]
    s_TR = x_TK.new_empty((num_rows, rank))
    tile = down_tile(rank)
    launch(
        down_kernel,
        (cdiv(num_rows, tile["BLOCK_T"]), cdiv(rank, tile["BLOCK_R"])),
        x_TK,
        a_RK,
        s_TR,
        keys_T,
        num_rows,
        inner,
        rank,
        x_TK.stride(0),
        a_RK.stride(0),
        dropout_threshold(dropout),
        1.0 / (1.0 - dropout),
        **tile,
    )
    return s_TR


def up(
    s_TR: Tensor, b_NR: Tensor, scale: float, start_TN: Tensor | None, bias_N: Tensor | None, dropout: float, keys_T: Tensor | None
) -> Tensor:
    """Y (T, N), which a matrix product then adds to."""
    (num_rows, rank), num_columns = s_TR.shape, b_NR.shape[0]
    out_TN = s_TR.new_empty((num_rows, num_columns))
    tile = up_tile(rank)
    launch(
        up_kernel,
        (cdiv(num_rows, tile["BLOCK_T"]), cdiv(num_columns, tile["BLOCK_N"])),
        s_TR,
        b_NR,
        start_TN,
        bias_N,
        keys_T,
        out_TN,
        num_rows,
        num_columns,
        rank,
        s_TR.stride(0),
        b_NR.stride(0),
        b_NR.stride(1),
        0 if start_TN is None else start_TN.stride(0),
        scale / (1.0 - dropout),
        dropout_threshold(dropout),
        **tile,
    )
    return out_TN


def grad(left_TR: Tensor, right_TN: Tensor, scale: float, dropout: float, keys_T: Tensor | None, transposed: bool) -> Tensor:
    """scale left^T drop(right), fp32, (R, N), or its transpose, laid out as asked; partial sums over chunks are added in order."""
    (num_rows, rank), num_columns = left_TR.shape, right_TN.shape[1]
    num_chunks, rows_at_once = chunks_of(num_rows, num_columns, rank)
    shape = (num_columns, rank) if transposed else (rank, num_columns)
    partial = left_TR.new_empty((num_chunks, *shape), dtype=torch.float32)
    tile = grad_tile(rank)
    launch(
        grad_kernel,
        (cdiv(num_columns, tile["BLOCK_N"]), cdiv(rank, tile["BLOCK_R"]), num_chunks),
        left_TR,
        right_TN,
        keys_T,
        partial,
        num_rows,
        num_columns,
        rank,
        rows_at_once,
        left_TR.stride(0),
        right_TN.stride(0),
        rank if transposed else 1,
        1 if transposed else num_columns,
        scale / (1.0 - dropout),
        dropout_threshold(dropout),
        **tile,
    )
    return partial[0] if num_chunks == 1 else partial.sum(0)


def dropout_threshold(dropout: float) -> int:
    """A uniform 24-bit number below this is dropped."""
    return math.ceil(dropout * 2**24)


def rank_block(rank: int, largest: int) -> int:
    """Ranks that a program holds at a time."""
    return min(largest, max(16, power_of_2(rank)))


def down_tile(rank: int) -> dict[str, int]:
    """Blocks of the kernel that makes S."""
    return {"BLOCK_T": 64, "BLOCK_R": rank_block(rank, 128), "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


def up_tile(rank: int) -> dict[str, int]:
    """Blocks of the kernel that goes back from S."""
    return {"BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_R": rank_block(rank, 64), "num_warps": 4, "num_stages": 1}


def grad_tile(rank: int) -> dict[str, int]:
    """Blocks of the kernel that makes the gradients of A and B."""
    return {"BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_R": rank_block(rank, 128), "num_warps": 8, "num_stages": 4}


def chunks_of(num_rows: int, num_columns: int, rank: int) -> tuple[int, int]:
    """Chunks of tokens, and tokens in each."""
    tile = grad_tile(rank)
    side_by_side = cdiv(num_columns, tile["BLOCK_N"]) * cdiv(rank, tile["BLOCK_R"])
    num_chunks, blocks_at_once = chunks_for(cdiv(num_rows, tile["BLOCK_T"]), side_by_side)
    return num_chunks, blocks_at_once * tile["BLOCK_T"]


@triton.jit
def keep(keys, columns, threshold):
    """Whether the input `columns` of the token with `keys` stays: the hash of structcot_kernels.reference.keep_mask, in its top 24 bits."""
    mixed = keys + columns.to(tl.int64) * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    mixed = mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)
    return ((mixed >> 40) & 0xFFFFFF) >= threshold


@triton.jit
def down_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    keys_ptr,
    num_rows,
    inner,
    rank,
    x_stride,
    a_stride,
    threshold,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program for BLOCK_T rows and BLOCK_R ranks."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    keys = tl.load(keys_ptr + rows, mask=rows < num_rows, other=0)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = (rows < num_rows) & (columns[None, :] < inner)
        x = tl.load(x_ptr + rows * x_stride + columns[None, :], mask=inside, other=0.0)
        x = tl.where(keep(keys, columns[None, :], threshold), x, 0.0)
        a = tl.load(
            a_ptr + ranks[None, :] * a_stride + columns[:, None], mask=(ranks[None, :] < rank) & (columns[:, None] < inner), other=0.0
        )
        total = tl.dot(x, a, total, input_precision="ieee")
    fits = (rows < num_rows) & (ranks[None, :] < rank)
    tl.store(s_ptr + rows * rank + ranks[None, :], (total * scale).to(s_ptr.dtype.element_ty), mask=fits)


@triton.jit
def up_kernel(
    s_ptr,
    b_ptr,
    start_ptr,
    bias_ptr,
    keys_ptr,
    out_ptr,
    num_rows,
    num_columns,
    rank,
    s_stride,
    b_stride_n,
    b_stride_r,
    start_stride,
    scale,
    threshold,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program for BLOCK_T rows and BLOCK_N columns; missing `start`, `bias` and `keys` are None, and then left out."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for first in range(0, rank, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + rows * s_stride + ranks[None, :], mask=(rows < num_rows) & (ranks[None, :] < rank), other=0.0)
        b_offsets = columns * b_stride_n + ranks[:, None].to(tl.int64) * b_stride_r
        b = tl.load(b_ptr + b_offsets, mask=(columns < num_columns) & (ranks[:, None] < rank), other=0.0)
        total = tl.dot(s, b, total, input_precision="ieee")
    total *= scale
    if keys_ptr is not None:
        keys = tl.load(keys_ptr + rows, mask=rows < num_rows, other=0)
        total = tl.where(keep(keys, columns, threshold), total, 0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    if start_ptr is not None:
        total += tl.load(start_ptr + rows * start_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * num_columns + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grad_kernel(
    left_ptr,
    right_ptr,
    keys_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    rank,
    rows_at_once,
    left_stride,
    right_stride,
    out_stride_n,
    out_stride_r,
    scale,
    threshold,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program for BLOCK_N columns and BLOCK_R ranks of a chunk of rows."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    chunk = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(0, rows_at_once, BLOCK_T):
        rows = chunk * rows_at_once + start + tl.arange(0, BLOCK_T)[:, None]
        inside = (rows < num_rows) & (columns[None, :] < num_columns)
        right = tl.load(right_ptr + rows * right_stride + columns[None, :], mask=inside, other=0.0)
        if keys_ptr is not None:
            keys = tl.load(keys_ptr + rows, mask=rows < num_rows, other=0)
            right = tl.where(keep(keys, columns[None, :], threshold), right, 0.0)
        left = tl.load(left_ptr + rows * left_stride + ranks[None, :], mask=(rows < num_rows) & (ranks[None, :] < rank), other=0.0)
        total = tl.dot(tl.trans(right), left, total, input_precision="ieee")
    fits = (columns[:, None] < num_columns) & (ranks[None, :] < rank)
    offsets = chunk * num_columns * rank + columns[:, None].to(tl.int64) * out_stride_n + ranks[None, :].to(tl.int64) * out_stride_r
    tl.store(partial_ptr + offsets, total * scale, mask=fits)
