"""Self-attention of a pre-norm decoder with its residual, as one differentiable function that recomputes inside.

    out = hidden + o(attention(rope(q(x)), rope(k(x)), v(x))),   x = rms_norm(hidden)

Replaying the block as a whole would run o_proj for nothing and attention a second time; here the backward replays the norm, q, k, v and
their rotation, and attention only where its output was not kept. With an exchange, tokens are those of this rank and attention runs on
this rank's heads of all tokens. Legend: T tokens, D hidden, H query heads, G key-value heads, d head width, P positions of the rotary
table, S documents, R adapter rank; in what the attention reads and writes, T and H are those of the exchange.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from structcot_kernels._head_exchange import (
    HeadExchange,
    all_heads_of_tokens,
    heads_of_all_tokens,
    need_exchange,
    repeated,
    summed,
)
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
    unflatten,
)
from structcot_kernels.attention_varlen import attention_backward, attention_forward, choose_attention
from structcot_kernels.checks import need_shape
from structcot_kernels.reference import Projection, other_input
from structcot_kernels.rms_norm import rms_norm_forward, rms_norm_gradients
from structcot_kernels.rope import rope_forward


class AttentionOptions(NamedTuple):
    """What is no tensor. `implementation` is the name of the attention that was chosen."""

    scales: tuple[float, ...]
    max_seqlen: int
    eps: float
    dropout: float
    recompute: str
    implementation: str
    exchange: HeadExchange | None


class Layout(NamedTuple):
    """Where each token stands: rotary tables by position, and the documents' borders."""

    positions_T: Tensor
    cos_Pd: Tensor
    sin_Pd: Tensor
    cu_seqlens_S1: Tensor

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.cos_Pd.shape[1]


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
    """hidden + attention(norm(hidden)), (T, D).

    `positions_T` (int64) are rows of the rotary tables (P, d, fp32), `cu_seqlens_S1` (int32) the documents' borders, `max_seqlen` the
    tokens of the longest, `q_norm_d` and `k_norm_d` norms of each head before the rotation (Qwen3). `recompute` says what is kept beyond
    `hidden_TD` and the adapters' low-rank inputs: "full" nothing, "block" the attention's output and log-sum-exp, "none" also the norm's
    output and q, k, v as the attention saw them. o_proj is never replayed, attention only by "full". With `exchange` the T tokens are one
    rank's slice, while `cu_seqlens_S1` and `max_seqlen` are those of the documents of all ranks together.

    Raises:
        ValueError: if a shape or device does not fit, `recompute` or `implementation` is no known word, or there is dropout but no keys.
        TypeError: if a dtype does not fit.
        RuntimeError: if the implementation cannot run here.
    """
    need_recompute("attention_block", recompute)
    num_hidden, head_dim = hidden_TD.shape[1], cos_Pd.shape[1]
    need_projections("attention_block", hidden_TD, num_hidden, {"q": q, "k": k, "v": v}, dropout, dropout_keys_T)
    need_projections("attention_block", hidden_TD, q.weight_NK.shape[0], {"o": o}, dropout, dropout_keys_T)
    need_shape("attention_block", "o weight_NK", o.weight_NK, (num_hidden, q.weight_NK.shape[0]))
    need_shape("attention_block", "v weight_NK", v.weight_NK, k.weight_NK.shape)
    need_shape("attention_block", "norm_weight_D", norm_weight_D, (num_hidden,))
    for name, projection in (("q", q), ("k", k)):
        if projection.weight_NK.shape[0] % head_dim:
            raise ValueError(
                f"attention_block: {name} has {projection.weight_NK.shape[0]} outputs, no multiple of the head width {head_dim}"
            )
    if exchange is not None:
        need_exchange("attention_block", exchange, hidden_TD.shape[0], q.weight_NK.shape[0] // head_dim)
    if (q_norm_d is None) != (k_norm_d is None):
        raise ValueError("attention_block: got only one of q_norm_d and k_norm_d; give both or neither")
    chosen = choose_attention(implementation, hidden_TD.device, hidden_TD.dtype, head_dim)
    options = AttentionOptions(tuple(p.scale for p in (q, k, v, o)), max_seqlen, eps, dropout, recompute, chosen, exchange)
    layout = (positions_T, cos_Pd, sin_Pd, cu_seqlens_S1)
    return _AttentionBlock.apply(options, hidden_TD, norm_weight_D, q_norm_d, k_norm_d, dropout_keys_T, *layout, *flatten((q, k, v, o)))


class Heads(NamedTuple):
    """What the attention reads; and, where heads are normed, what their norms read, with the scale of each head."""

    q_THd: Tensor
    k_TGd: Tensor
    v_TGd: Tensor
    raw_q_THd: Tensor | None
    raw_k_TGd: Tensor | None
    q_rstd: Tensor | None
    k_rstd: Tensor | None


def make_heads(
    x_TD: Tensor, group: list[Projection], s_TR: Tensor, layout: Layout, norms: tuple[Tensor | None, Tensor | None], eps: float
) -> Heads:
    """q, k and v of every token: projected, normed if there are norms, and turned by their positions."""
    q_THd, k_TGd, v_TGd = (out_TN.unflatten(1, (-1, layout.head_dim)) for out_TN in project_group(x_TD, group, s_TR))
    (normed_q_THd, raw_q_THd, q_rstd), (normed_k_TGd, raw_k_TGd, k_rstd) = (
        norm_heads(heads, weight, eps) for heads, weight in zip((q_THd, k_TGd), norms, strict=True)
    )
    turned_q_THd, turned_k_TGd = (rope_forward(heads, *layout[:3], False) for heads in (normed_q_THd, normed_k_TGd))
    return Heads(turned_q_THd, turned_k_TGd, v_TGd, raw_q_THd, raw_k_TGd, q_rstd, k_rstd)


def norm_heads(heads: Tensor, weight_d: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Heads normed one by one, what was normed, and its scale; without a weight the heads as they are."""
    if weight_d is None:
        return heads, None, None
    normed, rstd = rms_norm_forward(heads.flatten(0, 1), weight_d.to(heads.dtype), eps)
    return normed.view(heads.shape), heads, rstd


def norm_heads_back(
    grad: Tensor, raw: Tensor | None, weight_d: Tensor | None, rstd: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of what was normed and, if needed, of the weight."""
    if raw is None or weight_d is None or rstd is None:
        return grad, None
    grad_rows, grad_weight_d = rms_norm_gradients(grad.flatten(0, 1), raw.flatten(0, 1), weight_d, rstd, None, True, need_weight)
    return grad_rows.view(grad.shape), grad_weight_d  # type: ignore[union-attr]


def attend(heads: Heads, layout: Layout, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Output (T, H, d) of this rank's tokens, and the log-sum-exp of the rows that this rank attended to."""
    q_THd, k_TGd, v_TGd = exchanged(heads, options.exchange)
    out_THd, lse_HT = attention_forward(q_THd, k_TGd, v_TGd, *packing_of(layout, options))
    if options.exchange is not None:
        (out_THd,) = all_heads_of_tokens([out_THd], options.exchange)
    return out_THd, lse_HT


def attend_back(dout_THd: Tensor, out_THd: Tensor, lse_HT: Tensor, heads: Heads, layout: Layout, options: AttentionOptions) -> list[Tensor]:
    """Gradients of q, k and v of this rank's tokens."""
    exchange = options.exchange
    q_THd, k_TGd, v_TGd = exchanged(heads, exchange)
    if exchange is not None:
        dout_THd, out_THd = (part.contiguous() for part in heads_of_all_tokens([dout_THd, out_THd], exchange))
    grads = list(attention_backward(dout_THd, q_THd, k_TGd, v_TGd, out_THd, lse_HT, *packing_of(layout, options)))
    if exchange is not None:
        num_kv_heads = heads.k_TGd.shape[1]
        dq_THd, *kv_grads = all_heads_of_tokens(grads, exchange)
        grads = [dq_THd, *(summed(grad_TGd, num_kv_heads) for grad_TGd in kv_grads)]
    return grads


def exchanged(heads: Heads, exchange: HeadExchange | None) -> list[Tensor]:
    """q, k and v as the attention of this rank reads them."""
    if exchange is None:
        return list(heads[:3])
    num_ranks = len(exchange.tokens_U)
    return heads_of_all_tokens([heads.q_THd, *(repeated(kv_TGd, num_ranks) for kv_TGd in heads[1:3])], exchange)


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        options: AttentionOptions,
        hidden_TD: Tensor,
        norm_weight_D: Tensor,
        q_norm_d: Tensor | None,
        k_norm_d: Tensor | None,
        keys_T: Tensor | None,
        positions_T: Tensor,
        cos_Pd: Tensor,
        sin_Pd: Tensor,
        cu_seqlens_S1: Tensor,
        *parameters: Tensor | None,
    ):
        *group, o = unflatten(parameters, options.scales)
        layout = Layout(positions_T, cos_Pd, sin_Pd, cu_seqlens_S1)
        x_TD, rstd_T = rms_norm_forward(hidden_TD, norm_weight_D.to(hidden_TD.dtype), options.eps)
        s_TR = low_rank_inputs(x_TD, group, options.dropout, keys_T)
        heads = make_heads(x_TD, group, s_TR, layout, (q_norm_d, k_norm_d), options.eps)
        attended = attend(heads, layout, options)
        out_TN = attended[0].flatten(1)
        s_o_TR = low_rank_inputs(out_TN, (o,), options.dropout, other_input(keys_T))
        result_TD = project_forward(out_TN, o, s_o_TR, residual_TN=hidden_TD)
        kept = (x_TD, rstd_T, *heads) if options.recompute == "none" else (None,) * 9
        kept_attended = (None, None) if options.recompute == "full" else attended
        norms = (norm_weight_D, q_norm_d, k_norm_d)
        ctx.save_for_backward(hidden_TD, *norms, keys_T, *layout, s_TR, s_o_TR, *kept_attended, *kept, *parameters)
        ctx.options = options
        return result_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        options, dropout, grad_TD = ctx.options, ctx.options.dropout, grad_TD.contiguous()
        hidden_TD, norm_weight_D, q_norm_d, k_norm_d, keys_T, *saved = ctx.saved_tensors
        layout, (s_TR, s_o_TR, out_THd, lse_HT, x_TD, rstd_T), heads, parameters = Layout(*saved[:4]), saved[4:10], saved[10:17], saved[17:]
        *group, o = unflatten(parameters, options.scales)
        _, need_hidden, need_norm, need_q_norm, need_k_norm, _, _, _, _, _, *needs = ctx.needs_input_grad
        if x_TD is None:
            x_TD, rstd_T = rms_norm_forward(hidden_TD, norm_weight_D.to(hidden_TD.dtype), options.eps)
            heads = make_heads(x_TD, group, s_TR, layout, (q_norm_d, k_norm_d), options.eps)
        heads = Heads(*heads)
        if out_THd is None:
            out_THd, lse_HT = attend(heads, layout, options)

        ds_o_TR = low_rank_output_grads((grad_TD,), (o,))
        o_arguments = (dropout, other_input(keys_T))
        o_grads = project_parameter_grads(out_THd.flatten(1), (grad_TD,), (o,), s_o_TR, ds_o_TR, *o_arguments, needs[12:])
        dout_THd = project_input_grad((grad_TD,), (o,), ds_o_TR, *o_arguments).view(out_THd.shape)
        dq_THd, dk_TGd, dv_TGd = attend_back(dout_THd, out_THd, lse_HT, heads, layout, options)
        dq_THd, dk_TGd = (rope_forward(grad, *layout[:3], True) for grad in (dq_THd, dk_TGd))
        dq_THd, dq_norm_d = norm_heads_back(dq_THd, heads.raw_q_THd, q_norm_d, heads.q_rstd, need_q_norm)
        dk_TGd, dk_norm_d = norm_heads_back(dk_TGd, heads.raw_k_TGd, k_norm_d, heads.k_rstd, need_k_norm)

        grads_TN = [grad.flatten(1) for grad in (dq_THd, dk_TGd, dv_TGd)]
        ds_TR = low_rank_output_grads(grads_TN, group)
        group_grads = project_parameter_grads(x_TD, grads_TN, group, s_TR, ds_TR, dropout, keys_T, needs[:12])
        dhidden_TD = dnorm_D = None
        if need_hidden or need_norm:
            dx_TD = project_input_grad(grads_TN, group, ds_TR, dropout, keys_T)
            dhidden_TD, dnorm_D = rms_norm_gradients(dx_TD, hidden_TD, norm_weight_D, rstd_T, grad_TD, need_hidden, need_norm)
        return None, dhidden_TD, dnorm_D, dq_norm_d, dk_norm_d, None, None, None, None, None, *group_grads, *o_grads


def packing_of(layout: Layout, options: AttentionOptions) -> tuple[Tensor, int, float, str]:
    """What attention needs beside its heads: borders, longest document, scale and implementation."""
    return layout.cu_seqlens_S1, options.max_seqlen, layout.head_dim**-0.5, options.implementation
