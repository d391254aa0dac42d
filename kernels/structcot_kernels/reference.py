"""Every operation in plain PyTorch, as plainly as it can be said: the specification that tests hold the others against.

Legend: T packed tokens, M supervised rows, D hidden, V vocabulary, K inputs and N outputs of a projection, R adapter rank, H query heads,
G key-value heads, d head width, F width of the MLP, P positions of the rotary table, S documents. Documents lie end to end in T;
`cu_seqlens_S1` holds their S + 1 borders.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from structcot_kernels._head_exchange import HeadExchange


class Projection(NamedTuple):
    """A weight (N, K), its bias (N,), and the adapter scale * B A with A (R, K) and B (N, R); bias and adapter may be missing."""

    weight_NK: Tensor
    bias_N: Tensor | None = None
    lora_a_RK: Tensor | None = None
    lora_b_NR: Tensor | None = None
    scale: float = 1.0


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


def lora_qkv(
    x_TK: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    dropout: float = 0.0,
    dropout_keys_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lora_linear` of x with each; all three see the same dropped inputs."""
    q_TN, k_TN, v_TN = (lora_linear(x_TK, *projection, dropout, dropout_keys_T) for projection in (q, k, v))
    return q_TN, k_TN, v_TN


def lora_gate_up(
    x_TK: Tensor, gate: Projection, up: Projection, dropout: float = 0.0, dropout_keys_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`lora_linear` of x with each; both see the same dropped inputs."""
    gate_TF, up_TF = (lora_linear(x_TK, *projection, dropout, dropout_keys_T) for projection in (gate, up))
    return gate_TF, up_TF


def attention_varlen(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_seqlens_S1: Tensor, max_seqlen: int, scale: float, implementation: str = "auto"
) -> Tensor:
    """Causal softmax(q k^T * scale) v inside each document; no token sees another. Query head h reads key-value head h * G // H."""
    repeats = q_THd.shape[1] // k_TGd.shape[1]
    documents = [q_THd[:0]]
    for start, end in itertools.pairwise(cu_seqlens_S1.tolist()):
        q_1HLd = q_THd[start:end].transpose(0, 1).unsqueeze(0)
        k_1HLd = k_TGd[start:end].transpose(0, 1).repeat_interleave(repeats, dim=0).unsqueeze(0)
        v_1HLd = v_TGd[start:end].transpose(0, 1).repeat_interleave(repeats, dim=0).unsqueeze(0)
        out_1HLd = F.scaled_dot_product_attention(q_1HLd, k_1HLd, v_1HLd, is_causal=True, scale=scale)
        documents.append(out_1HLd.squeeze(0).transpose(0, 1))
    return torch.cat(documents)


def attention_block(
    hidden_TD: Tensor,
    norm_weight_D: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    positions_T: Tensor,
    cos_Pd: Tensor,
    sin_Pd: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    eps: float,
    q_norm_d: Tensor | None = None,
    k_norm_d: Tensor | None = None,
    dropout: float = 0.0,
    dropout_keys_T: Tensor | None = None,
    recompute: str = "block",
    implementation: str = "auto",
    exchange: HeadExchange | None = None,
) -> Tensor:
    """hidden + o(attention(rope(q(x)), rope(k(x)), v(x))) with x the norm of hidden, and heads normed before the rotation if asked.

    With `exchange` attention sees the tokens of all ranks, each of which gathers them all and keeps its own rows of the output.
    """
    head_dim = cos_Pd.shape[1]
    x_TD = rms_norm(hidden_TD, norm_weight_D.to(hidden_TD.dtype), eps)
    q_THd, k_TGd, v_TGd = (out_TN.unflatten(-1, (-1, head_dim)) for out_TN in lora_qkv(x_TD, q, k, v, dropout, dropout_keys_T))
    if q_norm_d is not None and k_norm_d is not None:
        q_THd, k_TGd = rms_norm(q_THd, q_norm_d.to(x_TD.dtype), eps), rms_norm(k_TGd, k_norm_d.to(x_TD.dtype), eps)
    q_THd, k_TGd = rope(q_THd, positions_T, cos_Pd, sin_Pd), rope(k_TGd, positions_T, cos_Pd, sin_Pd)
    q_THd, k_TGd, v_TGd = (heads if exchange is None else gather_rows(heads, exchange) for heads in (q_THd, k_TGd, v_TGd))
    out_THd = attention_varlen(q_THd, k_TGd, v_TGd, cu_seqlens_S1, max_seqlen, head_dim**-0.5)
    if exchange is not None:
        out_THd = out_THd.split(exchange.tokens_U)[exchange.rank]
    return hidden_TD + lora_linear(out_THd.flatten(1), *o, dropout, other_input(dropout_keys_T))


def gather_rows(rows_TNd: Tensor, exchange: HeadExchange) -> Tensor:
    """The rows of all ranks, in their order; the gradient of a row is summed over the ranks that read it."""
    padded = F.pad(rows_TNd, (0, 0, 0, 0, 0, max(exchange.tokens_U) - len(rows_TNd)))
    parts = all_gather(padded, exchange.group)
    return torch.cat([part[:num_tokens] for part, num_tokens in zip(parts, exchange.tokens_U, strict=True)])


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
    """hidden + down(silu(gate(x)) * up(x)) with x the norm of hidden."""
    x_TD = rms_norm(hidden_TD, norm_weight_D.to(hidden_TD.dtype), eps)
    act_TF = swiglu(*lora_gate_up(x_TD, gate, up, dropout, dropout_keys_T))
    return hidden_TD + lora_linear(act_TF, *down, dropout, other_input(dropout_keys_T))


def other_input(dropout_keys_T: Tensor | None) -> Tensor | None:
    """Keys for the second input that a block drops from, whose mask then has nothing to do with the first one's."""
    return None if dropout_keys_T is None else dropout_keys_T ^ 0x5851F42D4C957F2D


def linear_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of -log softmax(hidden W^T)[label], and the same for each row, which carries no gradient; both fp32 or wider."""
    logits_MV = F.linear(hidden_MD, weight_VD.to(hidden_MD.dtype))
    losses_M = F.cross_entropy(logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)), labels_M, reduction="none")
    return losses_M.sum(), losses_M.detach()


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: the sign bit does not smear."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
