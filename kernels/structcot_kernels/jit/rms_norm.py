"""Kernels of the root-mean-square norm. Legend: T rows, D row width, P partial sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structcot_kernels.launch import cdiv, launch, power_of_2

TILE_ELEMENTS = 4096
"""Elements that a program holds at a time; a longer row gets a program of its own."""

ROWS_PER_PARTIAL = 256
"""Rows that a program adds up of the weight's gradient; the partial sums are then added in a fixed order."""


def forward(hidden_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows, the sum (the rows themselves where nothing is added), and rstd (T,) in fp32."""
    num_rows, num_columns = hidden_TD.shape
    normed_TD = hidden_TD.new_empty(hidden_TD.shape)
    summed_TD = hidden_TD if delta_TD is None else torch.empty_like(normed_TD)
    rstd_T = hidden_TD.new_empty(num_rows, dtype=torch.float32)
    tile = tile_of(num_columns)
    launch(
        forward_kernel,
        (cdiv(num_rows, tile["BLOCK_T"]),),
        hidden_TD,
        delta_TD,
        weight_D,
        normed_TD,
        summed_TD,
        rstd_T,
        num_rows,
        num_columns,
        hidden_TD.stride(0),
        0 if delta_TD is None else delta_TD.stride(0),
        eps,
        HAS_DELTA=delta_TD is not None,
        **tile,
    )
    return normed_TD, summed_TD, rstd_T


def backward(grad_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, grad_residual_TD: Tensor | None) -> Tensor:
    """Gradient of the rows."""
    num_rows, num_columns = hidden_TD.shape
    grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape)
    tile = tile_of(num_columns)
    launch(
        backward_kernel,
        (cdiv(num_rows, tile["BLOCK_T"]),),
        grad_TD,
        hidden_TD,
        weight_D,
        rstd_T,
        grad_residual_TD,
        grad_hidden_TD,
        num_rows,
        num_columns,
        grad_TD.stride(0),
        hidden_TD.stride(0),
        0 if grad_residual_TD is None else grad_residual_TD.stride(0),
        HAS_RESIDUAL=grad_residual_TD is not None,
        **tile,
    )
    return grad_hidden_TD


def weight_grad(grad_TD: Tensor, hidden_TD: Tensor, rstd_T: Tensor) -> Tensor:
    """Gradient (D,) of the weight."""
    num_rows, num_columns = hidden_TD.shape
    num_partials, block_D = cdiv(num_rows, ROWS_PER_PARTIAL), 128
    partial_PD = hidden_TD.new_empty((num_partials, num_columns), dtype=torch.float32)
    launch(
        weight_grad_kernel,
        (num_partials, cdiv(num_columns, block_D)),
        grad_TD,
        hidden_TD,
        rstd_T,
        partial_PD,
        num_rows,
        num_columns,
        grad_TD.stride(0),
        hidden_TD.stride(0),
        ROWS=ROWS_PER_PARTIAL,
        BLOCK_T=32,
        BLOCK_D=block_D,
    )
    return partial_PD.sum(0).to(hidden_TD.dtype)


def tile_of(num_columns: int) -> dict[str, int]:
    """Rows and columns of a program's tile, and its warps."""
    block_D = power_of_2(num_columns)
    return {"BLOCK_T": max(1, TILE_ELEMENTS // block_D), "BLOCK_D": block_D, "num_warps": 8 if block_D > 512 else 4}


@triton.jit
def forward_kernel(
    hidden_ptr,
    delta_ptr,
    weight_ptr,
    normed_ptr,
    summed_ptr,
    rstd_ptr,
    num_rows,
    num_columns,
    hidden_stride,
    delta_stride,
    eps,
    HAS_DELTA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_T rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    x = tl.load(hidden_ptr + rows * hidden_stride + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + rows * delta_stride + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)  # the norm sees the rounded sum, as the next layer does
        tl.store(summed_ptr + rows * num_columns + columns, x, mask=inside)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / num_columns + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0)
    scaled = (wide * rstd).to(x.dtype)
    normed = (scaled.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    tl.store(normed_ptr + rows * num_columns + columns, normed, mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def backward_kernel(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    rstd_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    num_columns,
    grad_stride,
    hidden_stride,
    residual_stride,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_T rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
    scaled = tl.load(hidden_ptr + rows * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32) * rstd
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    weighted = tl.load(grad_ptr + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32) * weight
    along = tl.sum(weighted * scaled, axis=1, keep_dims=True) / num_columns
    out = (weighted - scaled * along) * rstd
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + rows * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * num_columns + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weight_grad_kernel(
    grad_ptr,
    hidden_ptr,
    rstd_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    grad_stride,
    hidden_stride,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for ROWS rows of BLOCK_D columns."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    total = tl.zeros((1, BLOCK_D), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_T):
        rows = chunk * ROWS + start + tl.arange(0, BLOCK_T)[:, None]
        inside = (rows < num_rows) & (columns < num_columns)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        hidden = tl.load(hidden_ptr + rows * hidden_stride + columns, mask=inside, other=0.0)
        scaled = (hidden.to(tl.float32) * rstd).to(hidden.dtype).to(tl.float32)
        grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(grad * scaled, axis=0, keep_dims=True)
    tl.store(partial_ptr + chunk * num_columns + columns, total, mask=columns < num_columns)
