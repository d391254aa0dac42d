"""The head and its loss, without its logits: the sum over rows of -log softmax(hidden W^T)[label], and what the gradients need.

With d = z - z_label for the logits z of a row, and `others` the sum of exp(d) over all other columns:

    loss = log(1 + others),   dz = (exp(d) / (1 + others), for the label -others / (1 + others)),   dhidden = dz W,   dW = dz^T hidden

The label's own logit is not in the sum, so nothing cancels: the loss of a sure token keeps its digits. Gradients are made in the forward,
a chunk of rows at a time, since 4 M V D operations then do where keeping neither logits nor gradients takes 6; a row's gradient is kept
without its factor, which the backward applies together with the gradient of the sum.

A weight of another dtype (fp32 masters) is rounded once to that of hidden; its gradient is added up in fp32 and comes back in its own.
Legend: M rows with a label, m rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from structcot_kernels._cost import Cost, matmul_cost, register_cost, size_bytes
from structcot_kernels.checks import can_be_read, need_like, need_rows, need_shape
from structcot_kernels.jit import linear_cross_entropy as jit
from structcot_kernels.launch import arch_of, cdiv, runs_triton

CHUNK_BYTES = 1_250_000_000
"""Exponentials that the kernels hold at a time: 4,096 rows of 152,064 in bf16. Each chunk reads the weight again, so fewer are better."""

TORCH_CHUNK_ELEMENTS = 2**25
"""Logits that PyTorch holds at a time: 220 rows of 152,064, enough to make a product of them rather than a stream of weights."""

CACHED_ELEMENTS = 2**20
"""Logits that PyTorch goes through at a time on a CPU, so that its many passes over them stay in the cache."""


def linear_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of -log softmax(hidden W^T)[label], and the same for each row.

    Labels are int64 in [0, V): rows without one are left out before. No row gives an exact 0 that still has a graph.

    Returns:
        The fp32 sum, to be divided once by the labels of the whole step, and the losses (M,) in fp32, which carry no gradient. On a GPU a
        label outside [0, V) shows as the loss nan of its row, since looking at it would wait for the device.

    Raises:
        ValueError: if a shape, stride or device does not fit, or, on a CPU, a label lies outside [0, V).
        TypeError: if a dtype does not fit.
    """
    need_hidden, need_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_MD, weight_VD))
    loss_sum, losses_M, *_ = linear_cross_entropy_forward(hidden_MD, weight_VD, labels_M, need_hidden, need_weight)
    return loss_sum, losses_M


# Operators


@torch.library.custom_op("structcot::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `Made` holds."""
    need_operands(hidden_MD, weight_VD, labels_M)
    return forward_in_chunks(hidden_MD, weight_VD, labels_M, need_hidden, need_weight)


@torch.library.custom_op("structcot::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad_sum: Tensor, grad_hidden_MD: Tensor, scale_M: Tensor, grad_weight_VD: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and of the weight, from what the forward made; without rows where it made none."""
    num_rows = grad_hidden_MD.shape[0]
    need_shape("linear_cross_entropy_backward", "grad_sum", grad_sum, ())
    need_shape("linear_cross_entropy_backward", "scale_M", scale_M[:num_rows], (num_rows,))
    grad_hidden = scale_rows(grad_hidden_MD, scale_M[:num_rows], grad_sum, grad_hidden_MD.dtype)
    return grad_hidden, scale_rows(grad_weight_VD, None, grad_sum, weight_dtype)


def need_operands(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> None:
    """Refuse what the kernels would misread, and, where that costs no waiting, labels outside [0, V)."""
    name, num_columns = "linear_cross_entropy", weight_VD.shape[0]
    need_shape(name, "hidden_MD", hidden_MD, (-1, -1))
    need_shape(name, "weight_VD", weight_VD, (-1, hidden_MD.shape[1]))
    need_shape(name, "labels_M", labels_M, (hidden_MD.shape[0],))
    need_like(name, hidden_MD)
    need_like(name, weight_VD)
    for operand, tensor in (("weight_VD", weight_VD), ("labels_M", labels_M)):
        if tensor.device != hidden_MD.device:
            raise ValueError(f"{name}: {operand} lies on {tensor.device}; it must lie on {hidden_MD.device}, as hidden_MD does")
    if labels_M.dtype != torch.int64:
        raise TypeError(f"{name}: labels_M is {labels_M.dtype}; it must be torch.int64")
    need_rows(name, hidden_MD=hidden_MD, weight_VD=weight_VD)
    if can_be_read(labels_M) and labels_M.numel() and not runs_triton(hidden_MD):
        low, high = (int(bound) for bound in labels_M.aminmax())
        if low < 0 or high >= num_columns:
            raise ValueError(
                f"{name}: labels_M holds {low if low < 0 else high}; labels must lie in [0, {num_columns}): leave out rows that have none"
            )


# The chunks


class Made(NamedTuple):
    """What a forward leaves: the losses and their sum, hidden's gradient without the rows' factors, these, the weight's gradient in fp32.

    What is not needed has no rows.
    """

    loss_sum: Tensor
    losses_M: Tensor
    grad_hidden_MD: Tensor
    scale_M: Tensor
    grad_weight_VD: Tensor


def made_of(hidden_MD: Tensor, weight_VD: Tensor, need_hidden: bool, need_weight: bool) -> Made:
    """Room for it."""
    num_rows, inner = hidden_MD.shape
    return Made(
        loss_sum=hidden_MD.new_empty((), dtype=torch.float32),
        losses_M=hidden_MD.new_empty(num_rows, dtype=torch.float32),
        grad_hidden_MD=hidden_MD.new_empty((num_rows if need_hidden else 0, inner)),
        scale_M=hidden_MD.new_empty(num_rows if need_hidden or need_weight else 0, dtype=torch.float32),
        grad_weight_VD=hidden_MD.new_empty((weight_VD.shape[0] if need_weight else 0, inner), dtype=torch.float32),
    )


def forward_in_chunks(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, need_hidden: bool, need_weight: bool) -> Made:
    """The forward, a chunk of rows at a time; with recorded launches it also runs on tensors without memory."""
    num_rows, num_columns = hidden_MD.shape[0], weight_VD.shape[0]
    made, need_grad, triton = made_of(hidden_MD, weight_VD, need_hidden, need_weight), need_hidden or need_weight, runs_triton(hidden_MD)
    made.grad_weight_VD.zero_()
    weight_VD, labels_M = weight_VD.to(hidden_MD.dtype), labels_M.contiguous()
    exponentials = jit.exponentials if triton else torch_exponentials
    chunk = kernel_chunk(num_columns, hidden_MD.element_size()) if triton else max(1, TORCH_CHUNK_ELEMENTS // max(1, num_columns))
    exp_mV = None
    if need_grad or not triton:
        padded_mV = hidden_MD.new_empty((min(chunk, num_rows), cdiv(num_columns, 16) * 16))  # kernels store 16 bytes at once
        padded_mV[:, num_columns:].zero_()  # a CPU with AMX multiplies columns in pairs, one beyond the last by 0: NaN would stay NaN
        exp_mV = padded_mV[:, :num_columns]
    for start in range(0, num_rows, chunk):
        part = slice(start, min(start + chunk, num_rows))
        hidden_mD, scale_m = hidden_MD[part], made.scale_M[part] if need_grad else None
        exp_mV = None if exp_mV is None else exp_mV[: part.stop - start]
        exponentials(hidden_mD, weight_VD, labels_M[part], exp_mV, made.losses_M[part], scale_m)
        if need_hidden:
            torch.mm(exp_mV, weight_VD, out=made.grad_hidden_MD[part])
        if need_weight:
            add_weight_grad(made.grad_weight_VD, exp_mV, scale_rows(hidden_mD, scale_m, None, hidden_mD.dtype))
    torch.sum(made.losses_M, 0, out=made.loss_sum)
    return made


def kernel_chunk(num_columns: int, width: int) -> int:
    """Rows of a chunk, whole blocks of the kernel's; `width` is the bytes of an element."""
    return max(1, CHUNK_BYTES // (128 * width * max(1, num_columns))) * 128


def add_weight_grad(grad_weight_VD: Tensor, exp_mV: Tensor, rows_mD: Tensor) -> None:
    """Add exp^T rows, in fp32."""
    if exp_mV.dtype == torch.float32:
        grad_weight_VD.addmm_(exp_mV.T, rows_mD)
    elif exp_mV.is_cpu:  # which multiplies narrow numbers into narrow ones only
        grad_weight_VD += exp_mV.T @ rows_mD
    else:
        torch.addmm(grad_weight_VD, exp_mV.T, rows_mD, out_dtype=torch.float32, out=grad_weight_VD)


def scale_rows(rows_MD: Tensor, scale_M: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`rows_MD` times `scale_M` (M,) times `factor` (), either of which may be missing, rounded once to `dtype`."""
    if runs_triton(rows_MD):
        return jit.scale_rows(rows_MD, scale_M, factor, dtype)
    if scale_M is None:
        return (rows_MD * factor).to(dtype)  # type: ignore[operator]
    scale_M1 = (scale_M if factor is None else scale_M * factor).unsqueeze(1)
    return (rows_MD * scale_M1).to(dtype)


def torch_exponentials(
    hidden_mD: Tensor, weight_VD: Tensor, labels_m: Tensor, exp_mV: Tensor, losses_m: Tensor, scale_m: Tensor | None
) -> None:
    """The same in PyTorch, whose rows come out with the factor 1: logits are rounded as its product rounds them, but the label's is not."""
    torch.mm(hidden_mD, weight_VD.T, out=exp_mV)
    target_m = (hidden_mD.float() * weight_VD[labels_m].float()).sum(1)
    if scale_m is not None:
        scale_m.fill_(1.0)
    block = max(1, CACHED_ELEMENTS // weight_VD.shape[0]) if exp_mV.is_cpu else len(labels_m)
    for start in range(0, len(labels_m), block):
        part = slice(start, start + block)
        label_m1, wide_mV = labels_m[part].unsqueeze(1), exp_mV[part].float()
        wide_mV.scatter_(1, label_m1, -torch.inf)
        top_m = wide_mV.amax(1).clamp_(min=torch.finfo(torch.float32).min)
        total_m = wide_mV.sub_(top_m.unsqueeze(1)).exp_().sum(1)
        top_m -= target_m[part]
        losses_m[part] = F.softplus(top_m + total_m.log())
        if scale_m is not None:
            share_m = (total_m + top_m.neg().exp()).reciprocal()  # of the exponential of `top`, whatever the label's is
            wide_mV *= share_m.unsqueeze(1)
            wide_mV.scatter_(1, label_m1, -(total_m * share_m).unsqueeze(1))
            if wide_mV.dtype != exp_mV.dtype:
                exp_mV[part] = wide_mV


# What torch.compile, fake tensors and autograd need to know


@linear_cross_entropy_forward.register_fake
def _(hidden_MD, weight_VD, labels_M, need_hidden, need_weight):
    return made_of(hidden_MD, weight_VD, need_hidden, need_weight)


@linear_cross_entropy_backward.register_fake
def _(grad_sum, grad_hidden_MD, scale_M, grad_weight_VD, weight_dtype):
    return torch.empty_like(grad_hidden_MD), torch.empty_like(grad_weight_VD, dtype=weight_dtype)


def save_made(ctx, inputs, output):
    """Keep what the forward made; only the sum is differentiable."""
    _, weight_VD, _, ctx.need_hidden, ctx.need_weight = inputs
    _, losses_M, *made = output
    ctx.weight_dtype = weight_VD.dtype
    ctx.save_for_backward(*made)
    ctx.mark_non_differentiable(losses_M, *made)
    ctx.set_materialize_grads(False)  # or the backward would first fill zeros of the size of everything that was made


def gradients(ctx, grad_sum, *_):
    """For hidden, weight, labels and the two flags."""
    grad_hidden_MD, grad_weight_VD = linear_cross_entropy_backward(grad_sum, *ctx.saved_tensors, ctx.weight_dtype)
    return grad_hidden_MD if ctx.need_hidden else None, grad_weight_VD if ctx.need_weight else None, None, None, None


linear_cross_entropy_forward.register_autograd(gradients, setup_context=save_made)


# Cost: of the kernels, chunk by chunk. A repaired row costs its products again; that is not in here, as no formula can know of it.


@register_cost(linear_cross_entropy_forward)
def _(hidden_MD, weight_VD, labels_M, need_hidden, need_weight):
    (num_rows, inner), num_columns, width = hidden_MD.shape, weight_VD.shape[0], hidden_MD.element_size()
    chunk = kernel_chunk(num_columns, width)
    costs = []
    if weight_VD.dtype != hidden_MD.dtype:
        costs.append(Cost(0.0, size_bytes(weight_VD) + width * weight_VD.numel()))
    if need_weight:
        costs.append(Cost(0.0, 4 * weight_VD.numel()))
    for start in range(0, num_rows, chunk):
        rows = min(chunk, num_rows - start)
        costs += chunk_costs(hidden_MD[start : start + rows], num_columns, need_hidden or need_weight)
        if need_hidden:
            costs.append(matmul_cost(rows, inner, num_columns, width))
        if need_weight:
            sums = Cost(2.0 * rows * num_columns * inner, width * rows * (num_columns + inner) + 8 * weight_VD.numel())
            costs += [scale_cost((rows, inner), 2 * width, has_scale=True, has_factor=False), sums]
    return costs


def chunk_costs(hidden_mD: Tensor, num_columns: int, need_grad: bool) -> list[Cost]:
    """Label's logit, exponentials, rows, repair. The weight comes through memory once for each group of row blocks, hidden once."""
    (rows, inner), width = hidden_mD.shape, hidden_mD.element_size()
    tile = jit.tile_of(hidden_mD.dtype, rows, arch_of(hidden_mD))
    row_blocks, column_blocks = cdiv(rows, tile["BLOCK_M"]), cdiv(num_columns, tile["BLOCK_V"])
    repair_blocks = cdiv(num_columns, jit.repair_tile(tile)["BLOCK_V"])
    groups = cdiv(row_blocks, jit.GROUP.value)
    read_by_rows, weight = rows * (inner * width + (12 if need_grad else 8)), num_columns * inner * width
    partials = 8 * rows * column_blocks
    stored = partials + (rows * num_columns * width if need_grad else 0)
    cached = (column_blocks - 1) * read_by_rows + (row_blocks - groups) * weight
    return [
        Cost(2.0 * rows * inner, rows * (2 * inner * width + 12)),
        Cost(2.0 * rows * num_columns * inner + 4.0 * rows * num_columns, read_by_rows + groups * weight + stored, cached),
        Cost(3.0 * rows * column_blocks, partials + rows * (28 + width if need_grad else 8)),
        *([Cost(0.0, 4 * rows, 4 * rows * (repair_blocks - 1))] if need_grad else []),
    ]


@register_cost(linear_cross_entropy_backward)
def _(grad_sum, grad_hidden_MD, scale_M, grad_weight_VD, weight_dtype):
    hidden = scale_cost(grad_hidden_MD.shape, 2 * grad_hidden_MD.element_size(), has_scale=True, has_factor=True)
    return [hidden, scale_cost(grad_weight_VD.shape, 4 + weight_dtype.itemsize, has_scale=False, has_factor=True)]


def scale_cost(shape: tuple[int, ...], width: int, *, has_scale: bool, has_factor: bool) -> Cost:
    """`scale_rows`, with `width` bytes of an element read and written."""
    rows, columns = shape
    column_blocks = cdiv(columns, jit.COLUMNS.value)
    programs = cdiv(rows, jit.ROWS.value) * column_blocks
    scale, factor = 4 * rows * has_scale, 4 * has_factor * min(1, programs)
    return Cost(float(rows * columns), rows * columns * width + scale + factor, scale * (column_blocks - 1) + factor * (programs - 1))
