"""The gated MLP of a pre-norm decoder with its residual, as one differentiable function that recomputes inside.

    out = hidden + down(silu(gate(x)) * up(x)),   x = rms_norm(hidden)

A frozen weight needs no gradient, so nothing in the backward asks for what down_proj made; a checkpoint around the block would run it
again for nothing, a tenth of a step's frozen products in Qwen2.5-32B. Here the backward makes the norm, gate and up again at most, and
SwiGLU's own backward makes the activation.

Where Triton runs, the low-rank products of gate and up, and the one in the gradient of down's input, ride inside SwiGLU, whose kernels
wait for memory while the tensor cores idle. Legend: T tokens, D hidden, F width of the MLP, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from structcot_kernels._projection import (
    flatten,
    low_rank_inputs,
    low_rank_output_grads,
    need_projections,
    need_recompute,
    project_forward,
    project_group,
    project_input_grad,
    project_parameter_grads,
    ranks_of,
    stacked_a,
    unflatten,
)
from structcot_kernels.checks import need_shape
from structcot_kernels.launch import runs_triton
from structcot_kernels.reference import Projection, other_input
from structcot_kernels.rms_norm import rms_norm_forward, rms_norm_gradients
from structcot_kernels.swiglu import swiglu_backward, swiglu_forward
from structcot_kernels.swiglu_low_rank import MAX_RANK, swiglu_low_rank_backward, swiglu_low_rank_forward

B_GATE, B_UP, A_DOWN = 3, 7, 10
"""Places among the flattened parameters: weight, bias, A, B of gate, up and down."""


class MlpOptions(NamedTuple):
    """What is no tensor. `rides`: the low-rank products are made inside SwiGLU."""

    scales: tuple[float, ...]
    eps: float
    dropout: float
    recompute: str
    rides: bool


def mlp_block(
    hidden_TD: Tensor,
    norm_weight_D: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    eps: float,
    dropout: float = 0.0,
    dropout_keys_T: Tensor | None = None,
    recompute: str = "block",
) -> Tensor:
    """hidden + mlp(norm(hidden)), (T, D).

    `recompute` says what the backward makes again: "none" keeps the norm's output, gate and up, 2 (D + 2 F) bytes a token in bf16, beyond
    what "block" and "full" keep, which is `hidden_TD` and the adapters' low-rank inputs.

    Raises:
        ValueError: if a shape or device does not fit, `recompute` is another word, or there is dropout but no keys.
        TypeError: if a dtype does not fit.
    """
    projections = (gate, up, down)
    need_recompute("mlp_block", recompute)
    num_inner, num_hidden = gate.weight_NK.shape[0], hidden_TD.shape[1]
    need_projections("mlp_block", hidden_TD, num_hidden, {"gate": gate, "up": up}, dropout, dropout_keys_T)
    need_projections("mlp_block", hidden_TD, num_inner, {"down": down}, dropout, dropout_keys_T)
    need_shape("mlp_block", "up weight_NK", up.weight_NK, (num_inner, num_hidden))
    need_shape("mlp_block", "down weight_NK", down.weight_NK, (num_hidden, num_inner))
    need_shape("mlp_block", "norm_weight_D", norm_weight_D, (num_hidden,))
    options = MlpOptions(tuple(p.scale for p in projections), eps, dropout, recompute, low_rank_rides(hidden_TD, projections, dropout))
    return _MlpBlock.apply(options, hidden_TD, norm_weight_D, dropout_keys_T, *flatten(projections))


def low_rank_rides(hidden_TD: Tensor, projections: Sequence[Projection], dropout: float) -> bool:
    """Whether the kernels that make low-rank products inside SwiGLU can serve.

    Each projection has an adapter, all of one rank that they hold, gate's and up's of one scale; no input is dropped, and nobody needs the
    activation for a weight's gradient.
    """
    (rank, *others), (gate, up, _) = ranks_of(projections), projections
    alike = 0 < rank <= MAX_RANK and all(other == rank for other in others) and gate.scale == up.scale
    frozen = not any(projection.weight_NK.requires_grad for projection in projections)
    return alike and frozen and dropout == 0.0 and runs_triton(hidden_TD)


def gate_and_up(x_TD: Tensor, gate: Projection, up: Projection, s_TR: Tensor, rides: bool) -> list[Tensor]:
    """Outputs of both; without their adapters where those ride in SwiGLU."""
    if rides:
        bare = [Projection(projection.weight_NK, projection.bias_N) for projection in (gate, up)]
        return project_group(x_TD, bare, s_TR[:, :0])
    return project_group(x_TD, (gate, up), s_TR)


def riding(gate: Projection, up: Projection, s_TR: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """What SwiGLU needs to make the low-rank products of gate and up: S of both, B of each, and their scale."""
    b_gate_FR, b_up_FR = (projection.lora_b_NR.to(s_TR.dtype).contiguous() for projection in (gate, up))  # type: ignore[union-attr]
    return s_TR, b_gate_FR, b_up_FR, gate.scale


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options: MlpOptions, hidden_TD: Tensor, norm_weight_D: Tensor, keys_T: Tensor | None, *parameters: Tensor | None):
        gate, up, down = unflatten(parameters, options.scales)
        x_TD, rstd_T = rms_norm_forward(hidden_TD, norm_weight_D.to(hidden_TD.dtype), options.eps)
        s_TR = low_rank_inputs(x_TD, (gate, up), options.dropout, keys_T)
        gate_TF, up_TF = gate_and_up(x_TD, gate, up, s_TR, options.rides)
        if options.rides:
            act_TF, s_down_TR = swiglu_low_rank_forward(gate_TF, up_TF, *riding(gate, up, s_TR), stacked_a((down,), x_TD.dtype))
        else:
            act_TF = swiglu_forward(gate_TF, up_TF)
            s_down_TR = low_rank_inputs(act_TF, (down,), options.dropout, other_input(keys_T))
        out_TD = project_forward(act_TF, down, s_down_TR, residual_TN=hidden_TD)
        kept = (x_TD, rstd_T, gate_TF, up_TF) if options.recompute == "none" else (None, None, None, None)
        ctx.save_for_backward(hidden_TD, norm_weight_D, keys_T, s_TR, s_down_TR, *kept, *parameters)
        ctx.options = options
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        options, grad_TD = ctx.options, grad_TD.contiguous()
        hidden_TD, norm_weight_D, keys_T, s_TR, s_down_TR, x_TD, rstd_T, gate_TF, up_TF, *parameters = ctx.saved_tensors
        gate, up, down = unflatten(parameters, options.scales)
        _, need_hidden, need_norm, _, *needs = ctx.needs_input_grad
        dropout, down_keys_T = options.dropout, other_input(keys_T)
        if x_TD is None:
            x_TD, rstd_T = rms_norm_forward(hidden_TD, norm_weight_D.to(hidden_TD.dtype), options.eps)
            gate_TF, up_TF = gate_and_up(x_TD, gate, up, s_TR, options.rides)

        ds_down_TR = low_rank_output_grads((grad_TD,), (down,))
        made: dict[int, Tensor] = {}  # parameter gradients that SwiGLU's backward makes on its way, by place among the parameters
        if options.rides:
            dact_TF, act_TF = grad_TD @ down.weight_NK.to(grad_TD.dtype), None
            dgate_TF, dup_TF, (made[B_GATE], made[B_UP]), made[A_DOWN] = swiglu_low_rank_backward(
                dact_TF, gate_TF, up_TF, *riding(gate, up, s_TR), ds_down_TR, stacked_a((down,), grad_TD.dtype)
            )
        else:
            dact_TF = project_input_grad((grad_TD,), (down,), ds_down_TR, dropout, down_keys_T)
            dgate_TF, dup_TF, act_TF = swiglu_backward(dact_TF, gate_TF, up_TF, any(needs[8:]))
        del dact_TF, gate_TF, up_TF

        ds_TR = low_rank_output_grads((dgate_TF, dup_TF), (gate, up))
        rest = [need and place not in made for place, need in enumerate(needs)]
        parameter_grads = project_parameter_grads(x_TD, (dgate_TF, dup_TF), (gate, up), s_TR, ds_TR, dropout, keys_T, rest[:8])
        parameter_grads += project_parameter_grads(act_TF, (grad_TD,), (down,), s_down_TR, ds_down_TR, dropout, down_keys_T, rest[8:])
        for place, grad in made.items():
            parameter_grads[place] = grad.to(parameters[place].dtype)
        del act_TF
        dhidden_TD = dnorm_D = None
        if need_hidden or need_norm:
            dx_TD = project_input_grad((dgate_TF, dup_TF), (gate, up), ds_TR, dropout, keys_T)
            dhidden_TD, dnorm_D = rms_norm_gradients(dx_TD, hidden_TD, norm_weight_D, rstd_T, grad_TD, need_hidden, need_norm)
        return None, dhidden_TD, dnorm_D, None, *parameter_grads
