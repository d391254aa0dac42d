"""Kernels of the gate of a gated MLP. Legend: T tokens, F width of the MLP."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from structcot_kernels.launch import cdiv, launch

TILE = {"BLOCK_T": 4, "BLOCK_F": 1024, "num_warps": 8}


def forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """The activation."""
    act_TF = gate_TF.new_empty(gate_TF.shape)
    launch(forward_kernel, grid_of(gate_TF), gate_TF, up_TF, act_TF, *gate_TF.shape, gate_TF.stride(0), up_TF.stride(0), **TILE)
    return act_TF


def backward(grad_act_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, need_act: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the activation or nothing."""
    grad_gate_TF, grad_up_TF = (gate_TF.new_empty(gate_TF.shape) for _ in range(2))
    act_TF = gate_TF.new_empty(gate_TF.shape if need_act else 0)
    launch(
        backward_kernel,
        grid_of(gate_TF),
        grad_act_TF,
        gate_TF,
        up_TF,
        grad_gate_TF,
        grad_up_TF,
        act_TF,
        *gate_TF.shape,
        grad_act_TF.stride(0),
        gate_TF.stride(0),
        up_TF.stride(0),
        NEED_ACT=need_act,
        **TILE,
    )
    return grad_gate_TF, grad_up_TF, act_TF


def grid_of(rows_TF: Tensor) -> tuple[int, int]:
    """A program for each tile."""
    return cdiv(rows_TF.shape[0], TILE["BLOCK_T"]), cdiv(rows_TF.shape[1], TILE["BLOCK_F"])


@triton.jit
def forward_kernel(gate_ptr, up_ptr, act_ptr, num_rows, num_columns, gate_stride, up_stride, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """One program for BLOCK_T rows of BLOCK_F columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate) * up
    tl.store(act_ptr + rows * num_columns + columns, act.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    act_ptr,
    num_rows,
    num_columns,
    grad_stride,
    gate_stride,
    up_stride,
    NEED_ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program for BLOCK_T rows of BLOCK_F columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    out = rows * num_columns + columns
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + out, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + out, (grad * silu).to(grad_up_ptr.dtype.element_ty), mask=inside)
    if NEED_ACT:
        tl.store(act_ptr + out, (silu * up).to(act_ptr.dtype.element_ty), mask=inside)
