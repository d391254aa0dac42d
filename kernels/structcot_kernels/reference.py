"""Every operation in plain PyTorch: the specification, and what runs on a CPU.

Legend: T packed tokens, M supervised rows, D hidden, V vocabulary, K inputs and N outputs of a projection, R adapter rank, H query heads,
G key-value heads, d head width, F width of the MLP, P positions of the rotary table, S documents. Documents lie end to end in T;
`cu_seqlens_S1` holds their S + 1 borders.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**25
"""Logits held at a time by the head: 128 MiB in fp32."""


def rms_norm(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm x / sqrt(mean(x^2) + eps) * weight, reduced in fp32 and rounded before the weight is applied.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    wide_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    scaled_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return weight_D * scaled_TD.to(hidden_TD.dtype)


def add_rms_norm(hidden_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of hidden + delta, and hidden + delta."""
    summed_TD = hidden_TD + delta_TD
    return rms_norm(summed_TD, weight_D, eps), summed_TD


def rope(heads_THd: Tensor, positions_T: Tensor, cos_Pd: Tensor, sin_Pd: Tensor) -> Tensor:
    """Rotate the two halves of each head by its token's position (Su et al. 2021, arXiv 2104.09864; the half-split form of Llama)."""
    cos_T1d = cos_Pd[positions_T].to(heads_THd.dtype).unsqueeze(1)
    sin_T1d = sin_Pd[positions_T].to(heads_THd.dtype).unsqueeze(1)
    first, second = heads_THd.chunk(2, dim=-1)
    return heads_THd * cos_T1d + torch.cat((-second, first), dim=-1) * sin_T1d


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate_TF) * up_TF


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
    """Projection x W^T + bias + scale * drop(x) A^T B^T (Hu et al. 2021, arXiv 2106.09685); without A and B a plain one.

    Parameters of another dtype than x (fp32 masters) are rounded to it here. With `dropout`, `dropout_keys_T` (int64) decides which inputs
    of each token are dropped, so a token's mask does not depend on how tokens are laid into batches.

    Raises:
        ValueError: if there is dropout but no keys, or only one of A and B.
    """
    base_TN = F.linear(x_TK, weight_NK.to(x_TK.dtype), None if bias_N is None else bias_N.to(x_TK.dtype))
    if lora_a_RK is None and lora_b_NR is None:
        return base_TN
    if lora_a_RK is None or lora_b_NR is None:
        raise ValueError("lora_linear: got only one of lora_a_RK and lora_b_NR; give both or neither")
    if dropout > 0.0:
        if dropout_keys_T is None:
            raise ValueError(f"lora_linear: dropout is {dropout} but dropout_keys_T is missing; give one int64 key for each token")
        x_TK = x_TK * keep_mask(dropout_keys_T, x_TK.shape[1], dropout).to(x_TK.dtype) / (1.0 - dropout)
    low_TR = x_TK @ lora_a_RK.to(x_TK.dtype).T
    return torch.addmm(base_TN, low_TR, lora_b_NR.to(x_TK.dtype).T, alpha=scale)


def keep_mask(keys_T: Tensor, num_columns: int, dropout: float) -> Tensor:
    """Boolean (T, num_columns) mask of the inputs that stay.

    A hash of (key, column) by the finalizer of SplitMix64 (Steele et al. 2014): counter-based, so no random state is kept.
    """
    columns_K = torch.arange(num_columns, device=keys_T.device, dtype=torch.int64)
    mixed_TK = keys_T.unsqueeze(1) + columns_K * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed_TK = (mixed_TK ^ _shift_right(mixed_TK, shift)) * factor
    uniform_TK = _shift_right(mixed_TK ^ _shift_right(mixed_TK, 31), 40).double() / 2**24
    return uniform_TK >= dropout


def attention_varlen(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_seqlens_S1: list[int], scale: float) -> Tensor:
    """Causal softmax(q k^T * scale) v inside each document; no token sees another. Query head h reads key-value head h * G // H."""
    repeats = q_THd.shape[1] // k_TGd.shape[1]
    documents = []
    for start, end in itertools.pairwise(cu_seqlens_S1):
        q_1HLd = q_THd[start:end].transpose(0, 1).unsqueeze(0)
        k_1HLd = k_TGd[start:end].transpose(0, 1).repeat_interleave(repeats, dim=0).unsqueeze(0)
        v_1HLd = v_TGd[start:end].transpose(0, 1).repeat_interleave(repeats, dim=0).unsqueeze(0)
        out_1HLd = F.scaled_dot_product_attention(q_1HLd, k_1HLd, v_1HLd, is_causal=True, scale=scale)
        documents.append(out_1HLd.squeeze(0).transpose(0, 1))
    return torch.cat(documents)


def linear_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of -log softmax(hidden W^T)[label], and the same for each row.

    Gradients are made in the forward, a chunk of rows at a time, so logits are never kept; the log-sum-exp is taken in fp32. M = 0 gives an
    exact 0 that still has a graph. The row losses (M, fp32) carry no gradient.

    Returns:
        The fp32 sum, to be divided once by the supervised tokens of the whole step, and the row losses.
    """
    return _LinearCrossEntropy.apply(hidden_MD, weight_VD, labels_M)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        weight = weight_VD.to(hidden_MD.dtype)
        losses_M = torch.empty(hidden_MD.shape[0], dtype=torch.float32, device=hidden_MD.device)
        grad_hidden_MD = torch.empty_like(hidden_MD) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        rows_at_once = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
        for start in range(0, hidden_MD.shape[0], rows_at_once):
            part = slice(start, start + rows_at_once)
            logits_mV = (hidden_MD[part] @ weight.T).float()
            target_m1 = labels_M[part].unsqueeze(1)
            total_m1 = logits_mV.logsumexp(-1, keepdim=True)
            losses_M[part] = (total_m1 - logits_mV.gather(1, target_m1)).squeeze(1)
            if not (need_hidden or need_weight):
                continue
            grad_logits_mV = logits_mV.sub_(total_m1).exp_()
            grad_logits_mV.scatter_add_(1, target_m1, torch.full_like(total_m1, -1.0))
            narrow_mV = grad_logits_mV.to(hidden_MD.dtype)
            if grad_hidden_MD is not None:
                torch.mm(narrow_mV, weight, out=grad_hidden_MD[part])
            if grad_weight_VD is not None:
                grad_weight_VD += narrow_mV.T @ hidden_MD[part]
        ctx.save_for_backward(grad_hidden_MD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(losses_M)
        return losses_M.sum(), losses_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor, _: Tensor):
        grad_hidden_MD, grad_weight_VD = ctx.saved_tensors
        hidden = None if grad_hidden_MD is None else (grad_hidden_MD * grad_sum).to(grad_hidden_MD.dtype)
        weight = None if grad_weight_VD is None else (grad_weight_VD * grad_sum).to(ctx.weight_dtype)
        return hidden, weight, None


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: the sign bit does not smear."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
