"""The gate of a gated MLP. Its backward makes the activation again where somebody needs it, so that nobody keeps it.

    act = silu(gate) up,   dgate = dact up silu'(gate),   dup = dact silu(gate),   silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))

Computed in fp32 and rounded once. Source: Shazeer 2020 (arXiv 2002.05202). Legend: T tokens, F width of the MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structcot_kernels._cost import Cost, register_cost, size_bytes
from structcot_kernels.checks import need_like, need_rows, need_shape
from structcot_kernels.jit import swiglu as jit
from structcot_kernels.launch import runs_triton


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up, (T, F).

    Raises:
        ValueError: if a shape, stride or device does not fit.
        TypeError: if a dtype does not fit.
    """
    return swiglu_forward(gate_TF, up_TF)


@torch.library.custom_op("structcot::swiglu_forward", mutates_args=())
def swiglu_forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """The activation (T, F)."""
    need_operands("swiglu", gate_TF, up_TF=up_TF)
    if runs_triton(gate_TF):
        return jit.forward(gate_TF, up_TF)
    return F.silu(gate_TF).mul_(up_TF)


@torch.library.custom_op("structcot::swiglu_backward", mutates_args=())
def swiglu_backward(grad_act_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, need_act: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the activation once more if `need_act`, else a tensor of no elements."""
    need_operands("swiglu_backward", gate_TF, up_TF=up_TF, grad_act_TF=grad_act_TF)
    if runs_triton(gate_TF):
        return jit.backward(grad_act_TF, gate_TF, up_TF, need_act)
    silu_TF, grad_gate_TF = F.silu(gate_TF), grad_act_TF * up_TF
    torch.ops.aten.silu_backward.grad_input(grad_gate_TF, gate_TF, grad_input=grad_gate_TF)
    if need_act:
        return grad_gate_TF, grad_act_TF * silu_TF, silu_TF.mul_(up_TF)
    return grad_gate_TF, silu_TF.mul_(grad_act_TF), gate_TF.new_empty(0)


def need_operands(operation: str, gate_TF: Tensor, **others: Tensor) -> None:
    """Refuse what the kernels would misread."""
    need_shape(operation, "gate_TF", gate_TF, (-1, -1))
    need_like(operation, gate_TF, **others)
    need_rows(operation, gate_TF=gate_TF, **others)
    for name, other in others.items():
        need_shape(operation, name, other, gate_TF.shape)


# What torch.compile, fake tensors and autograd need to know


@swiglu_forward.register_fake
def _(gate_TF, up_TF):
    return gate_TF.new_empty(gate_TF.shape)


@swiglu_backward.register_fake
def _(grad_act_TF, gate_TF, up_TF, need_act):
    return gate_TF.new_empty(gate_TF.shape), gate_TF.new_empty(gate_TF.shape), gate_TF.new_empty(gate_TF.shape if need_act else 0)


def save_inputs(ctx, inputs, output):
    """Gate and up are all that the backward needs."""
    ctx.save_for_backward(*inputs)


def gradients(ctx, grad_act_TF):
    """For gate and up."""
    return swiglu_backward(grad_act_TF.contiguous(), *ctx.saved_tensors, False)[:2]


swiglu_forward.register_autograd(gradients, setup_context=save_inputs)


# Cost: about 5 operations an element forward, 12 backward


@register_cost(swiglu_forward)
def _(gate_TF, up_TF):
    return [Cost(5.0 * gate_TF.numel(), 3 * size_bytes(gate_TF))]


@register_cost(swiglu_backward)
def _(grad_act_TF, gate_TF, up_TF, need_act):
    return [Cost(12.0 * gate_TF.numel(), (6 if need_act else 5) * size_bytes(gate_TF))]
