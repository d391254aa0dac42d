"""Kernels of SwiGLU with low-rank products inside. Legend: T tokens, F width of the MLP, R rank, P chunks of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structcot_kernels.jit.low_rank import rank_block
from structcot_kernels.launch import HOPPER, arch_of, cdiv, chunks_for, launch

MAX_RANK = 64
"""The largest rank whose factors' gradients fit well into registers beside the rest.

At 128 the backward's only tiles that neither spill on Hopper nor leave its own instruction take 16 rows and 64 columns with 8 warps, and
there both groups of warps make the same products.
"""


def forward(gate_TF: Tensor, up_TF: Tensor, s_T2R: Tensor, b_gate_FR: Tensor, b_up_FR: Tensor, scale: float, a_down_RF: Tensor):
    """The activation, and S of down."""
    (num_rows, width), rank = gate_TF.shape, a_down_RF.shape[0]
    act_TF, s_down_TR = gate_TF.new_empty(gate_TF.shape), gate_TF.new_empty((num_rows, rank))
    tile = forward_tile(rank)
    launch(
        forward_kernel,
        (cdiv(num_rows, tile["BLOCK_T"]),),
        gate_TF,
        up_TF,
        s_T2R,
        b_gate_FR,
        b_up_FR,
        a_down_RF,
        act_TF,
        s_down_TR,
        num_rows,
        width,
        rank,
        scale,
        **tile,
    )
    return act_TF, s_down_TR


def backward(
    grad_act_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    s_T2R: Tensor,
    b_gate_FR: Tensor,
    b_up_FR: Tensor,
    scale: float,
    ds_down_TR: Tensor,
    a_down_RF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and up, of both Bs (2, F, R), and of A of down (R, F)."""
    (num_rows, width), rank = gate_TF.shape, a_down_RF.shape[0]
    grad_gate_TF, grad_up_TF = (gate_TF.new_empty(gate_TF.shape) for _ in range(2))
    tile = backward_tile(rank, arch_of(gate_TF))
    num_chunks = chunks_of(num_rows, width, tile)
    grad_b_P2FR = gate_TF.new_empty((num_chunks, 2, width, rank), dtype=torch.float32)
    grad_a_PRF = gate_TF.new_empty((num_chunks, rank, width), dtype=torch.float32)
    launch(
        backward_kernel,
        (cdiv(width, tile["BLOCK_F"]), num_chunks),
        grad_act_TF,
        gate_TF,
        up_TF,
        s_T2R,
        b_gate_FR,
        b_up_FR,
        ds_down_TR,
        a_down_RF,
        grad_gate_TF,
        grad_up_TF,
        grad_b_P2FR,
        grad_a_PRF,
        num_rows,
        width,
        rank,
        scale,
        **tile,
    )
    grad_b_2FR, grad_a_RF = (partial[0] if num_chunks == 1 else partial.sum(0) for partial in (grad_b_P2FR, grad_a_PRF))
    return grad_gate_TF, grad_up_TF, grad_b_2FR, grad_a_RF


def forward_tile(rank: int) -> dict[str, int]:
    """Rows of a program, columns that it takes at a time."""
    return {"BLOCK_T": 128, "BLOCK_F": 32, "BLOCK_R": rank_block(rank, MAX_RANK), "num_warps": 8, "num_stages": 3}


def backward_tile(rank: int, arch: int) -> dict[str, int]:
    """Columns of a program, rows that it takes at a time: fewer before Hopper, whose products read shared memory."""
    rows = {"BLOCK_T": 32, "num_stages": 2} if arch >= HOPPER else {"BLOCK_T": 16, "num_stages": 1}
    return {**rows, "BLOCK_F": 64, "BLOCK_R": rank_block(rank, MAX_RANK), "num_warps": 4}


def chunks_of(num_rows: int, width: int, tile: dict[str, int]) -> int:
    """Chunks of rows; how many blocks of rows are in each, a program finds out."""
    return chunks_for(cdiv(num_rows, tile["BLOCK_T"]), cdiv(width, tile["BLOCK_F"]))[0]


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    s_ptr,
    b_gate_ptr,
    b_up_ptr,
    a_down_ptr,
    act_ptr,
    s_down_ptr,
    num_rows,
    width,
    rank,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program for BLOCK_T rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    ranks, ranks_down = tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_R)[:, None]
    fits = (rows < num_rows) & (ranks < rank)
    s_gate = tl.load(s_ptr + rows * (2 * rank) + ranks, mask=fits, other=0.0)
    s_up = tl.load(s_ptr + rows * (2 * rank) + rank + ranks, mask=fits, other=0.0)
    s_down = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, width, BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        inside = (rows < num_rows) & (columns[None, :] < width)
        offsets = rows * width + columns[None, :]
        gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        b_inside = (columns[:, None] < width) & (ranks < rank)
        b_gate = tl.load(b_gate_ptr + columns[:, None] * rank + ranks, mask=b_inside, other=0.0)
        b_up = tl.load(b_up_ptr + columns[:, None] * rank + ranks, mask=b_inside, other=0.0)
        gate += tl.dot(s_gate, tl.trans(b_gate), input_precision="ieee") * scale
        up += tl.dot(s_up, tl.trans(b_up), input_precision="ieee") * scale
        act = (gate * tl.sigmoid(gate) * up).to(act_ptr.dtype.element_ty)
        tl.store(act_ptr + offsets, act, mask=inside)
        a_inside = (ranks_down < rank) & (columns[None, :] < width)
        a_down = tl.load(a_down_ptr + ranks_down * width + columns[None, :], mask=a_inside, other=0.0)
        s_down = tl.dot(act, tl.trans(a_down), s_down, input_precision="ieee")
    tl.store(s_down_ptr + rows * rank + ranks, s_down.to(s_down_ptr.dtype.element_ty), mask=fits)


@triton.jit
def backward_kernel(
    grad_act_ptr,
    gate_ptr,
    up_ptr,
    s_ptr,
    b_gate_ptr,
    b_up_ptr,
    ds_down_ptr,
    a_down_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_b_ptr,
    grad_a_ptr,
    num_rows,
    width,
    rank,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program for BLOCK_F columns of a chunk of rows; tiles stand with F down, so that products feed products from registers."""
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[:, None]
    chunk = tl.program_id(1).to(tl.int64)
    rows_at_once = tl.cdiv(tl.cdiv(num_rows, BLOCK_T), tl.num_programs(1)) * BLOCK_T
    ranks = tl.arange(0, BLOCK_R)[None, :]
    factor_fits = (columns < width) & (ranks < rank)
    b_offsets, a_offsets = columns * rank + ranks, columns + ranks * width
    b_gate = tl.load(b_gate_ptr + b_offsets, mask=factor_fits, other=0.0)
    b_up = tl.load(b_up_ptr + b_offsets, mask=factor_fits, other=0.0)
    a_down = tl.load(a_down_ptr + a_offsets, mask=factor_fits, other=0.0)
    grad_b_gate, grad_b_up, grad_a = (tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32),) * 3
    rows, s_rows = tl.arange(0, BLOCK_T)[None, :], tl.arange(0, BLOCK_T)[:, None]
    for start in range(0, rows_at_once, BLOCK_T):
        first = chunk * rows_at_once + start
        left = num_rows - first
        inside, s_fits = (rows < left) & (columns < width), (s_rows < left) & (ranks < rank)
        s_gate = tl.load(s_ptr + first * (2 * rank) + s_rows * (2 * rank) + ranks, mask=s_fits, other=0.0)
        s_up = tl.load(s_ptr + first * (2 * rank) + rank + s_rows * (2 * rank) + ranks, mask=s_fits, other=0.0)
        ds_down = tl.load(ds_down_ptr + first * rank + s_rows * rank + ranks, mask=s_fits, other=0.0)
        offsets = first * width + rows * width + columns
        gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        gate += tl.dot(b_gate, tl.trans(s_gate), input_precision="ieee") * scale
        up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        up += tl.dot(b_up, tl.trans(s_up), input_precision="ieee") * scale
        grad_act = tl.load(grad_act_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        grad_act += tl.dot(a_down, tl.trans(ds_down), input_precision="ieee")
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_a = tl.dot((silu * up).to(a_down.dtype), ds_down, grad_a, input_precision="ieee")
        grad_up = (grad_act * silu).to(a_down.dtype)
        tl.store(grad_up_ptr + offsets, grad_up, mask=inside)
        grad_b_up = tl.dot(grad_up, s_up, grad_b_up, input_precision="ieee")
        grad_gate = (grad_act * up * (sigmoid + silu * (1.0 - sigmoid))).to(a_down.dtype)
        tl.store(grad_gate_ptr + offsets, grad_gate, mask=inside)
        grad_b_gate = tl.dot(grad_gate, s_gate, grad_b_gate, input_precision="ieee")
    b_out = grad_b_ptr + chunk * (2 * width * rank) + b_offsets
    tl.store(b_out, grad_b_gate * scale, mask=factor_fits)
    tl.store(b_out + width * rank, grad_b_up * scale, mask=factor_fits)
    tl.store(grad_a_ptr + chunk * (width * rank) + a_offsets, grad_a, mask=factor_fits)
