"""Projections with low-rank adapters: one, or a group that reads its input once (q, k and v; gate and up).

    y = x W^T + bias + s drop(x) A^T B^T

What is kept for the backward is x and S = drop(x) A^T, and no mask; formulas and the way through memory are in
structcot_kernels._projection. Source: Hu et al. 2021 (arXiv 2106.09685). Legend: T tokens, K inputs, N outputs, F width of the MLP, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from structcot_kernels._projection import (
    flatten,
    low_rank_inputs,
    low_rank_output_grads,
    need_projections,
    project_group,
    project_input_grad,
    project_parameter_grads,
    unflatten,
)
from structcot_kernels.reference import Projection


def lora_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    lora_a_RK: Tensor | None = None,
    lora_b_NR: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    dropout_keys_T: Tensor | None = None,
) -> Tensor:
    """X W^T + bias + scale * drop(x) A^T B^T, (T, N); without A and B a plain projection. Any rank.

    Parameters of another dtype than x (fp32 masters) are rounded to it; A and B get fp32 gradients, rounded once to their own dtype. With
    `dropout`, a hash of `dropout_keys_T` (int64) and the column decides what is dropped, so a token's mask depends on nothing else.

    Raises:
        ValueError: if a shape or device does not fit, only one of A and B is there, or there is dropout but no keys.
        TypeError: if a dtype does not fit.
    """
    projection = Projection(weight_NK, bias_N, lora_a_RK, lora_b_NR, scale)
    (out_TN,) = apply_group("lora_linear", x_TK, {"projection": projection}, dropout, dropout_keys_T)
    return out_TN


def lora_qkv(
    x_TK: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    dropout: float = 0.0,
    dropout_keys_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of attention, x read once for their adapters and dropped once for all three; biases and ranks may differ.

    Raises:
        ValueError: if a shape or device does not fit, or there is dropout but no keys.
        TypeError: if a dtype does not fit.
    """
    q_TN, k_TN, v_TN = apply_group("lora_qkv", x_TK, {"q": q, "k": k, "v": v}, dropout, dropout_keys_T)
    return q_TN, k_TN, v_TN


def lora_gate_up(
    x_TK: Tensor, gate: Projection, up: Projection, dropout: float = 0.0, dropout_keys_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two projections into the MLP, x read once for their adapters and dropped once for both.

    Raises:
        ValueError: if a shape or device does not fit, or there is dropout but no keys.
        TypeError: if a dtype does not fit.
    """
    gate_TF, up_TF = apply_group("lora_gate_up", x_TK, {"gate": gate, "up": up}, dropout, dropout_keys_T)
    return gate_TF, up_TF


def apply_group(
    operation: str, x_TK: Tensor, projections: dict[str, Projection], dropout: float, keys_T: Tensor | None
) -> tuple[Tensor, ...]:
    """Outputs of the group, differentiable; leading dimensions of x may be many."""
    rows_TK = x_TK.reshape(-1, x_TK.shape[-1])
    need_projections(operation, rows_TK, rows_TK.shape[1], projections, dropout, keys_T)
    group = list(projections.values())
    scales = tuple(projection.scale for projection in group)
    outputs = _Group.apply(scales, dropout, rows_TK, keys_T, *flatten(group))
    return tuple(out_TN.view(*x_TK.shape[:-1], -1) for out_TN in outputs)


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales: tuple[float, ...], dropout: float, x_TK: Tensor, keys_T: Tensor | None, *parameters: Tensor | None):
        group = unflatten(parameters, scales)
        s_TR = low_rank_inputs(x_TK, group, dropout, keys_T)
        ctx.save_for_backward(x_TK, s_TR, keys_T, *parameters)
        ctx.scales, ctx.dropout = scales, dropout
        return tuple(project_group(x_TK, group, s_TR))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads_TN: Tensor):
        x_TK, s_TR, keys_T, *parameters = ctx.saved_tensors
        group = unflatten(parameters, ctx.scales)
        _, _, need_input, _, *needs = ctx.needs_input_grad
        grads_TN = tuple(grad_TN.contiguous() for grad_TN in grads_TN)
        ds_TR = low_rank_output_grads(grads_TN, group)
        parameter_grads = project_parameter_grads(x_TK, grads_TN, group, s_TR, ds_TR, ctx.dropout, keys_T, needs)
        dx_TK = project_input_grad(grads_TN, group, ds_TR, ctx.dropout, keys_T) if need_input else None
        return None, None, dx_TK, None, *parameter_grads
