"""Root-mean-square norm, with the residual add before it, or the residual's gradient behind it, in the same pass.

    y = round(x * rstd) * w,   rstd = 1 / sqrt(mean(x^2) + eps)
    dx = rstd * (dy w - x rstd * mean(dy w x rstd)) + dresidual,   dw = sum over rows of dy x rstd

Source: Zhang and Sennrich 2019 (arXiv 1910.07467). Sums are taken in fp32; the scaled row is rounded before the weight is applied, as
Llama's own code does. Legend: T rows, D row width, P partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structcot_kernels._cost import Cost, register_cost, size_bytes
from structcot_kernels.checks import need_like, need_rows, need_shape
from structcot_kernels.jit import rms_norm as jit
from structcot_kernels.launch import runs_triton


def rms_norm(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise each row of `hidden_TD` and multiply by `weight_D`, of the same dtype. Leading dimensions may be many.

    Raises:
        ValueError: if a shape, stride or device does not fit.
        TypeError: if a dtype does not fit.
    """
    rows_TD = hidden_TD.reshape(-1, hidden_TD.shape[-1])
    return rms_norm_forward(rows_TD, weight_D, eps)[0].view(hidden_TD.shape)


def add_rms_norm(hidden_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise, in one pass over memory.

    Returns:
        The normed sum and the sum itself, both (T, D).

    Raises:
        ValueError: if a shape, stride or device does not fit.
        TypeError: if a dtype does not fit.
    """
    normed_TD, summed_TD, _ = add_rms_norm_forward(hidden_TD, delta_TD, weight_D, eps)
    return normed_TD, summed_TD


# Operators


@torch.library.custom_op("structcot::rms_norm_forward", mutates_args=())
def rms_norm_forward(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normed rows, and rstd (T,) in fp32 for the backward."""
    need_operands("rms_norm", weight_D, hidden_TD=hidden_TD)
    if runs_triton(hidden_TD):
        normed_TD, _, rstd_T = jit.forward(hidden_TD, None, weight_D, eps)
        return normed_TD, rstd_T
    return torch_forward(hidden_TD, weight_D, eps)


@torch.library.custom_op("structcot::add_rms_norm_forward", mutates_args=())
def add_rms_norm_forward(hidden_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normed sum, the sum, and rstd (T,) in fp32 for the backward."""
    need_operands("add_rms_norm", weight_D, hidden_TD=hidden_TD, delta_TD=delta_TD)
    if runs_triton(hidden_TD):
        return jit.forward(hidden_TD, delta_TD, weight_D, eps)
    summed_TD = hidden_TD + delta_TD
    normed_TD, rstd_T = torch_forward(summed_TD, weight_D, eps)
    return normed_TD, summed_TD, rstd_T


@torch.library.custom_op("structcot::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, grad_residual_TD: Tensor | None = None
) -> Tensor:
    """Gradient of the rows, plus `grad_residual_TD` where the rows also went around the norm."""
    need_operands("rms_norm_backward", weight_D, hidden_TD=hidden_TD, grad_TD=grad_TD, grad_residual_TD=grad_residual_TD)
    if runs_triton(hidden_TD):
        return jit.backward(grad_TD, hidden_TD, weight_D, rstd_T, grad_residual_TD)
    scaled_TD = hidden_TD.float() * rstd_T.unsqueeze(1)
    weighted_TD = grad_TD.float() * weight_D.float()
    along_T1 = (weighted_TD * scaled_TD).mean(-1, keepdim=True)
    grad_hidden_TD = weighted_TD.addcmul_(scaled_TD, along_T1, value=-1.0).mul_(rstd_T.unsqueeze(1))
    if grad_residual_TD is not None:
        grad_hidden_TD += grad_residual_TD
    return grad_hidden_TD.to(hidden_TD.dtype)


@torch.library.custom_op("structcot::rms_norm_weight_grad", mutates_args=())
def rms_norm_weight_grad(grad_TD: Tensor, hidden_TD: Tensor, rstd_T: Tensor) -> Tensor:
    """Gradient (D,) of a trained weight, in the dtype of the rows."""
    need_shape("rms_norm_weight_grad", "grad_TD", grad_TD, hidden_TD.shape)
    if runs_triton(hidden_TD):
        return jit.weight_grad(grad_TD, hidden_TD, rstd_T)
    scaled_TD = (hidden_TD.float() * rstd_T.unsqueeze(1)).to(hidden_TD.dtype)
    return (grad_TD.float() * scaled_TD).sum(0).to(hidden_TD.dtype)


def rms_norm_gradients(
    grad_TD: Tensor,
    rows_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    grad_residual_TD: Tensor | None,
    need_rows: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows and of the weight, None where not needed; a weight of another dtype is rounded, and gets its own back."""
    grad_rows_TD = rms_norm_backward(grad_TD, rows_TD, weight_D.to(rows_TD.dtype), rstd_T, grad_residual_TD) if need_rows else None
    grad_weight_D = rms_norm_weight_grad(grad_TD, rows_TD, rstd_T).to(weight_D.dtype) if need_weight else None
    return grad_rows_TD, grad_weight_D


def need_operands(operation: str, weight_D: Tensor, hidden_TD: Tensor, **others: Tensor | None) -> None:
    """Refuse what the kernels would misread."""
    need_shape(operation, "weight_D", weight_D, (hidden_TD.shape[-1],))
    need_like(operation, hidden_TD, weight_D=weight_D, **others)
    need_rows(operation, hidden_TD=hidden_TD, weight_D=weight_D, **others)
    for name, other in others.items():
        if other is not None:
            need_shape(operation, name, other, hidden_TD.shape)


def torch_forward(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normed rows and rstd, in PyTorch."""
    wide_TD = hidden_TD.float()
    rstd_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * rstd_T1).to(hidden_TD.dtype) * weight_D, rstd_T1.squeeze(1)


# What torch.compile, fake tensors and autograd need to know


@rms_norm_forward.register_fake
def _(hidden_TD, weight_D, eps):
    return torch.empty_like(hidden_TD, memory_format=torch.contiguous_format), row_scale(hidden_TD)


@add_rms_norm_forward.register_fake
def _(hidden_TD, delta_TD, weight_D, eps):
    normed_TD, summed_TD = (torch.empty_like(hidden_TD, memory_format=torch.contiguous_format) for _ in range(2))
    return normed_TD, summed_TD, row_scale(hidden_TD)


@rms_norm_backward.register_fake
def _(grad_TD, hidden_TD, weight_D, rstd_T, grad_residual_TD=None):
    return torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)


@rms_norm_weight_grad.register_fake
def _(grad_TD, hidden_TD, rstd_T):
    return hidden_TD.new_empty(hidden_TD.shape[1])


def save_rows(ctx, inputs, output):
    """Keep the rows and their scale; with a residual add in front, the rows are its sum."""
    if len(inputs) == 3:
        (rows_TD, weight_D, _), (_, rstd_T) = inputs, output
    else:
        (_, _, weight_D, _), (_, rows_TD, rstd_T) = inputs, output
    ctx.save_for_backward(rows_TD, weight_D, rstd_T)
    ctx.mark_non_differentiable(rstd_T)
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad_TD, grad_summed_TD=None):
    """Gradients of the rows and of the weight."""
    rows_TD, weight_D, rstd_T = ctx.saved_tensors
    if grad_TD is None:
        return grad_summed_TD, None
    grad_residual_TD = None if grad_summed_TD is None else grad_summed_TD.contiguous()
    *need_rows, need_weight, _ = ctx.needs_input_grad
    return rms_norm_gradients(grad_TD.contiguous(), rows_TD, weight_D, rstd_T, grad_residual_TD, any(need_rows), need_weight)


def norm_gradients(ctx, grad_TD, _):
    """For hidden, weight, eps."""
    return *differentiate(ctx, grad_TD), None


def add_norm_gradients(ctx, grad_TD, grad_summed_TD, _):
    """For hidden, delta, weight, eps."""
    grad_rows_TD, grad_weight_D = differentiate(ctx, grad_TD, grad_summed_TD)
    return grad_rows_TD, grad_rows_TD, grad_weight_D, None


rms_norm_forward.register_autograd(norm_gradients, setup_context=save_rows)
add_rms_norm_forward.register_autograd(add_norm_gradients, setup_context=save_rows)


def row_scale(hidden_TD: Tensor) -> Tensor:
    """Empty (T,) in fp32."""
    return hidden_TD.new_empty(hidden_TD.shape[0], dtype=torch.float32)


# Cost: 4 operations an element forward, 8 backward


@register_cost(rms_norm_forward)
def _(hidden_TD, weight_D, eps):
    return [Cost(4.0 * hidden_TD.numel(), 2 * size_bytes(hidden_TD) + size_bytes(weight_D) + 4 * hidden_TD.shape[0])]


@register_cost(add_rms_norm_forward)
def _(hidden_TD, delta_TD, weight_D, eps):
    return [Cost(5.0 * hidden_TD.numel(), 4 * size_bytes(hidden_TD) + size_bytes(weight_D) + 4 * hidden_TD.shape[0])]


@register_cost(rms_norm_backward)
def _(grad_TD, hidden_TD, weight_D, rstd_T, grad_residual_TD=None):
    moved = 3 * size_bytes(hidden_TD) + size_bytes(weight_D, rstd_T, grad_residual_TD)
    return [Cost(8.0 * hidden_TD.numel(), moved)]


@register_cost(rms_norm_weight_grad)
def _(grad_TD, hidden_TD, rstd_T):
    return [Cost(3.0 * hidden_TD.numel(), 2 * size_bytes(hidden_TD) + size_bytes(rstd_T))]
