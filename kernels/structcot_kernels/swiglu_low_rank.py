"""SwiGLU with the low-rank products of the projections around it made inside, on tiles that its kernels hold anyway.

    g = gate + scale S_gate B_gate^T,   u = up + scale S_up B_up^T,   act = silu(g) u,   S_down = act A_down^T

    dact = grad_act + dS_down A_down,   dgate = dact u silu'(g),   dup = dact silu(g)
    dB_gate = scale dgate^T S_gate,   dB_up = scale dup^T S_up,   dA_down = dS_down^T act

SwiGLU reads and writes three to five activations of the MLP's full width and waits for memory while the tensor cores idle; products of a
small inner size cost it little time there, and not one byte of that width. Forward, a program owns rows and walks along F, so S_down needs
no partial sums; backward, a program owns columns and walks along a chunk of rows, so the gradients of the three factors stay in registers.
Chunks are added in a fixed order.

The three adapters have the same rank, gate's and up's the same scale. Nothing here is differentiable by itself:
structcot_kernels.mlp_block calls both operators. Legend: T tokens, F width of the MLP, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structcot_kernels._cost import Cost, register_cost, size_bytes
from structcot_kernels.checks import need_like, need_shape
from structcot_kernels.jit import swiglu_low_rank as jit
from structcot_kernels.jit.swiglu_low_rank import MAX_RANK as MAX_RANK
from structcot_kernels.launch import arch_of, cdiv, runs_triton


@torch.library.custom_op("structcot::swiglu_low_rank_forward", mutates_args=())
def swiglu_low_rank_forward(
    gate_TF: Tensor, up_TF: Tensor, s_T2R: Tensor, b_gate_FR: Tensor, b_up_FR: Tensor, scale: float, a_down_RF: Tensor
) -> tuple[Tensor, Tensor]:
    """The activation (T, F), and S of down (T, R), which is made of the rounded activation. `s_T2R` holds S of gate and of up."""
    need_operands("swiglu_low_rank_forward", a_down_RF, gate_TF=gate_TF, up_TF=up_TF, s_T2R=s_T2R, b_gate_FR=b_gate_FR, b_up_FR=b_up_FR)
    if runs_triton(gate_TF):
        return jit.forward(gate_TF, up_TF, s_T2R, b_gate_FR, b_up_FR, scale, a_down_RF)
    wide_gate_TF, wide_up_TF = adapted(gate_TF, up_TF, s_T2R, b_gate_FR, b_up_FR, scale)
    act_TF = F.silu(wide_gate_TF).mul_(wide_up_TF).to(gate_TF.dtype)
    return act_TF, act_TF @ a_down_RF.T


@torch.library.custom_op("structcot::swiglu_low_rank_backward", mutates_args=())
def swiglu_low_rank_backward(
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
    """Gradients of gate and up (T, F), and in fp32 of B of gate and of up (2, F, R) and of A of down (R, F).

    `grad_act_TF` is the activation's gradient through down's own weight; what comes through its adapter is added here from `ds_down_TR`,
    which carries down's scale.
    """
    wide = {"grad_act_TF": grad_act_TF, "gate_TF": gate_TF, "up_TF": up_TF}
    need_operands("swiglu_low_rank_backward", a_down_RF, **wide, s_T2R=s_T2R, b_gate_FR=b_gate_FR, b_up_FR=b_up_FR, ds_down_TR=ds_down_TR)
    if runs_triton(gate_TF):
        return jit.backward(grad_act_TF, gate_TF, up_TF, s_T2R, b_gate_FR, b_up_FR, scale, ds_down_TR, a_down_RF)
    dtype = gate_TF.dtype
    gate_TF, up_TF = adapted(gate_TF, up_TF, s_T2R, b_gate_FR, b_up_FR, scale)
    grad_act_TF, silu_TF = torch.addmm(grad_act_TF.float(), ds_down_TR.float(), a_down_RF.float()), F.silu(gate_TF)
    grad_gate_TF = torch.ops.aten.silu_backward(grad_act_TF * up_TF, gate_TF).to(dtype)
    grad_up_TF, act_TF = (grad_act_TF * silu_TF).to(dtype), (silu_TF * up_TF).to(dtype)
    grads_b = [scale * grad.float().T @ s for s, grad in zip(s_T2R.float().chunk(2, dim=1), (grad_gate_TF, grad_up_TF), strict=True)]
    return grad_gate_TF, grad_up_TF, torch.stack(grads_b), ds_down_TR.float().T @ act_TF.float()


def need_operands(operation: str, a_down_RF: Tensor, **others: Tensor) -> None:
    """Refuse what the kernels would misread."""
    need_shape(operation, "a_down_RF", a_down_RF, (-1, -1))
    (rank, width), num_rows = a_down_RF.shape, others["gate_TF"].shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{operation}: a_down_RF has rank {rank}; the kernels hold ranks from 1 to {MAX_RANK}")
    need_like(operation, others["gate_TF"], a_down_RF=a_down_RF, **others)
    shapes = {"TF": (num_rows, width), "T2R": (num_rows, 2 * rank), "FR": (width, rank), "TR": (num_rows, rank)}
    for name, tensor in {"a_down_RF": a_down_RF, **others}.items():
        if name != "a_down_RF":
            need_shape(operation, name, tensor, shapes[name.rpartition("_")[2]])
        if not tensor.is_contiguous():
            raise ValueError(f"{operation}: {name} has strides {tensor.stride()}; call contiguous() first")


def adapted(gate_TF: Tensor, up_TF: Tensor, s_T2R: Tensor, b_gate_FR: Tensor, b_up_FR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gate and up with their low-rank products added, fp32, in PyTorch: what checks the kernels, not what a CPU trains with."""
    s_gate_TR, s_up_TR = s_T2R.float().chunk(2, dim=1)
    gate_TF = torch.addmm(gate_TF.float(), s_gate_TR, b_gate_FR.float().T, alpha=scale)
    return gate_TF, torch.addmm(up_TF.float(), s_up_TR, b_up_FR.float().T, alpha=scale)


# What torch.compile and fake tensors need to know


@swiglu_low_rank_forward.register_fake
def _(gate_TF, up_TF, s_T2R, b_gate_FR, b_up_FR, scale, a_down_RF):
    return gate_TF.new_empty(gate_TF.shape), gate_TF.new_empty((gate_TF.shape[0], a_down_RF.shape[0]))


@swiglu_low_rank_backward.register_fake
def _(grad_act_TF, gate_TF, up_TF, s_T2R, b_gate_FR, b_up_FR, scale, ds_down_TR, a_down_RF):
    grad_b_2FR = gate_TF.new_empty((2, *b_gate_FR.shape), dtype=torch.float32)
    return gate_TF.new_empty(gate_TF.shape), gate_TF.new_empty(gate_TF.shape), grad_b_2FR, torch.empty_like(a_down_RF, dtype=torch.float32)


# Cost: what SwiGLU costs, three products forward and six backward; every program reads the factors (forward) or S (backward) again


@register_cost(swiglu_low_rank_forward)
def _(gate_TF, up_TF, s_T2R, b_gate_FR, b_up_FR, scale, a_down_RF):
    (num_rows, _), rank = gate_TF.shape, a_down_RF.shape[0]
    factors, programs = size_bytes(b_gate_FR, b_up_FR, a_down_RF), cdiv(num_rows, jit.forward_tile(rank)["BLOCK_T"])
    moved = 3 * size_bytes(gate_TF) + size_bytes(s_T2R) + size_bytes(s_T2R) // 2 + factors
    return [Cost((5.0 + 6.0 * rank) * gate_TF.numel(), moved, (programs - 1) * factors)]


@register_cost(swiglu_low_rank_backward)
def _(grad_act_TF, gate_TF, up_TF, s_T2R, b_gate_FR, b_up_FR, scale, ds_down_TR, a_down_RF):
    (num_rows, width), rank = gate_TF.shape, a_down_RF.shape[0]
    tile = jit.backward_tile(rank, arch_of(gate_TF))
    num_chunks, blocks = jit.chunks_of(num_rows, width, tile), cdiv(width, tile["BLOCK_F"])
    factors, low_rank = size_bytes(b_gate_FR, b_up_FR, a_down_RF), size_bytes(s_T2R, ds_down_TR)
    result_bytes = 4 * 3 * width * rank
    moved = 5 * size_bytes(gate_TF) + low_rank + factors + num_chunks * result_bytes
    kernel = Cost((12.0 + 12.0 * rank) * gate_TF.numel(), moved, (blocks - 1) * low_rank + (num_chunks - 1) * factors)
    return [kernel] if num_chunks == 1 else [kernel, Cost(float(num_chunks * 3 * width * rank), (num_chunks + 1) * result_bytes)]
