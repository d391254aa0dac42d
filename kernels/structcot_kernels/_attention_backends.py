"""Who computes attention, and how each is called: a forward that hands out its log-sum-exp, and a backward that is called by hand.

That takes functions below the libraries' public ones, whose names and keywords belong to a version. They were read in these sources, and
everything is passed by keyword, because parameters have been inserted in the middle before:

| implementation    | read in                                                             | functions                                     |
|-------------------|---------------------------------------------------------------------|-----------------------------------------------|
| flash_attention_4 | flash-attn-4 4.0.0b36, flash_attn/cute/interface.py                 | _flash_attn_fwd, ..._bwd                      |
| flash_attention_3 | flash_attn_3 3.0.0 (0251105a), hopper/flash_attn_interface.py       | _flash_attn_forward, ..._backward             |
| flash_attention_2 | flash-attn 2.7.0 to 2.8.3.post1, flash_attn/flash_attn_interface.py | _flash_attn_varlen_forward, ..._backward      |
| varlen            | torch 2.11.0 and 2.13.0, torch/nn/attention/varlen.py               | _varlen_attn, ..._backward                    |
| sdpa              | torch 2.13.0, schema of the operator                                | _scaled_dot_product_flash_attention_for_cpu.. |

The GPU kernels add up dq in the order in which blocks finish, so gradients repeat bit for bit only under
`torch.use_deterministic_algorithms(True)`, which all of them follow.

Legend: T packed tokens, S documents, H query heads, G key-value heads, R = H / G query heads that share one, d head width, L tokens of a
document, C of its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_SCORES = 1 << 26
"""Scores that the plain computation holds at a time: 256 MiB of fp32."""
LONGEST_IN_FP32 = 512
"""On a CPU the backward of documents up to this length runs in fp32: torch's bf16 kernel takes 4 times as long at 73 tokens, 1.6 at 200
and 1.2 at 400 (4 heads of 64, one thread, AVX512-BF16), and is the faster one from about 1,000 on.
"""

aten = torch.ops.aten


class Packing(NamedTuple):
    """How documents lie in T, and the factor of the scores."""

    cu_seqlens_S1: Tensor
    max_seqlen: int
    scale: float

    def keywords(self) -> dict[str, Any]:
        """What flash-attn 2, 3 and 4 call these, for self-attention."""
        return {
            "cu_seqlens_q": self.cu_seqlens_S1,
            "cu_seqlens_k": self.cu_seqlens_S1,
            "max_seqlen_q": self.max_seqlen,
            "max_seqlen_k": self.max_seqlen,
            "softmax_scale": self.scale,
        }

    def documents(self) -> Iterator[slice]:
        """The rows of each document that has any. Waits for the device."""
        for start, end in itertools.pairwise(self.cu_seqlens_S1.tolist()):
            if end > start:
                yield slice(start, end)


# flash-attn 4: kernels in CuTe DSL, compiled when they are first used


def flash_4_forward(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; later versions return more behind them."""
    forward = import_module("flash_attn.cute.interface")._flash_attn_fwd
    out_THd, lse_HT, *_ = forward(q=q_THd, k=k_TGd, v=v_TGd, causal=True, return_lse=True, **packing.keywords())
    return out_THd, lse_HT


def flash_4_backward(
    grad_THd: Tensor, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, out_THd: Tensor, lse_HT: Tensor, packing: Packing
) -> Sequence[Tensor]:
    """Gradients of q, k and v, in tensors of ours."""
    gradients = empty_like(q_THd, k_TGd, v_TGd)
    import_module("flash_attn.cute.interface")._flash_attn_bwd(
        q=q_THd,
        k=k_TGd,
        v=v_TGd,
        out=out_THd,
        dout=grad_THd,
        lse=lse_HT,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **named(gradients),
        **packing.keywords(),
    )
    return gradients


# flash-attn 3: Hopper


def flash_3_forward(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; what follows belongs to split keys, which training has not."""
    forward = import_module("flash_attn_interface")._flash_attn_forward
    out_THd, lse_HT, *_ = forward(q=q_THd, k=k_TGd, v=v_TGd, causal=True, **packing.keywords())
    return out_THd, lse_HT


def flash_3_backward(
    grad_THd: Tensor, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, out_THd: Tensor, lse_HT: Tensor, packing: Packing
) -> Sequence[Tensor]:
    """Gradients of q, k and v; here the mask is called `is_causal`."""
    gradients = empty_like(q_THd, k_TGd, v_TGd)
    import_module("flash_attn_interface")._flash_attn_backward(
        dout=grad_THd,
        q=q_THd,
        k=k_TGd,
        v=v_TGd,
        out=out_THd,
        softmax_lse=lse_HT,
        is_causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **named(gradients),
        **packing.keywords(),
    )
    return gradients


# flash-attn 2 and torch's own copy of it. Where no document is longer than one token they take queries for a batch that decodes and would
# need as many documents as tokens; a window that ends at the diagonal keeps them from it.


def flash_2_forward(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the other two belong to dropout."""
    out_THd, lse_HT, _, _ = import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward(
        q=q_THd, k=k_TGd, v=v_TGd, dropout_p=0.0, causal=True, window_size_left=-1, window_size_right=0, **packing.keywords()
    )
    return out_THd, lse_HT


def flash_2_backward(
    grad_THd: Tensor, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, out_THd: Tensor, lse_HT: Tensor, packing: Packing
) -> Sequence[Tensor]:
    """Gradients of q, k and v, in tensors of ours."""
    gradients = empty_like(q_THd, k_TGd, v_TGd)
    import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
        dout=grad_THd,
        q=q_THd,
        k=k_TGd,
        v=v_TGd,
        out=out_THd,
        softmax_lse=lse_HT,
        dropout_p=0.0,
        causal=True,
        window_size_left=-1,
        window_size_right=0,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **named(gradients),
        **packing.keywords(),
    )
    return gradients


def varlen_forward(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the random state belongs to dropout."""
    out_THd, lse_HT, _ = import_module("torch.nn.attention.varlen")._varlen_attn(
        query=q_THd, key=k_TGd, value=v_TGd, is_causal=True, **varlen_keywords(packing)
    )
    return out_THd, lse_HT


def varlen_backward(
    grad_THd: Tensor, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, out_THd: Tensor, lse_HT: Tensor, packing: Packing
) -> Sequence[Tensor]:
    """Gradients of q, k and v. No dropout, so what the random state holds is never read."""
    return import_module("torch.nn.attention.varlen")._varlen_attn_backward(
        grad_out=grad_THd,
        query=q_THd,
        key=k_TGd,
        value=v_TGd,
        out=out_THd,
        lse=lse_HT,
        is_causal=True,
        rng_state=torch.empty(2, dtype=torch.uint64, device=q_THd.device),
        **varlen_keywords(packing),
    )


def varlen_keywords(packing: Packing) -> dict[str, Any]:
    """What torch calls the members of a packing."""
    cu_seqlens_S1, max_seqlen, scale = packing
    lengths = {"cu_seq_q": cu_seqlens_S1, "cu_seq_k": cu_seqlens_S1, "max_q": max_seqlen, "max_k": max_seqlen}
    return {**lengths, "scale": scale, "window_size": [-1, 0]}


# sdpa: document by document. Key-value heads are the batch and the query heads that share one its heads, so that k and v are not copied


def sdpa_forward(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernel on a CPU; elsewhere a plain computation in fp32 for checks, which reads the borders on the host."""
    num_groups = k_TGd.shape[1]
    (out_THd,), lse_HT = empty_like(q_THd), q_THd.new_empty((q_THd.shape[1], q_THd.shape[0]), dtype=torch.float32)
    for rows in packing.documents():
        q_GRLd, k_G1Ld, v_G1Ld = (grouped(tensor[rows], num_groups) for tensor in (q_THd, k_TGd, v_TGd))
        if q_THd.is_cpu:
            shared = (k_G1Ld.expand_as(q_GRLd), v_G1Ld.expand_as(q_GRLd))
            out_GRLd, lse_GRL = aten._scaled_dot_product_flash_attention_for_cpu(q_GRLd, *shared, 0.0, True, scale=packing.scale)
        else:
            out_GRLd, lse_GRL = plain_forward(q_GRLd, k_G1Ld, v_G1Ld, packing.scale)
        grouped(out_THd[rows], num_groups).copy_(out_GRLd)
        lse_HT[:, rows].unflatten(0, (num_groups, -1)).copy_(lse_GRL)
    return out_THd, lse_HT


def sdpa_backward(
    grad_THd: Tensor, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, out_THd: Tensor, lse_HT: Tensor, packing: Packing
) -> Sequence[Tensor]:
    """Gradients of q, k and v; those of k and v are summed over the query heads that share one."""
    num_groups = k_TGd.shape[1]
    gradients = empty_like(q_THd, k_TGd, v_TGd)
    for rows in packing.documents():
        heads = (grouped(tensor[rows], num_groups) for tensor in (grad_THd, q_THd, k_TGd, v_TGd, out_THd))
        grad_GRLd, q_GRLd, k_G1Ld, v_G1Ld, out_GRLd = heads
        lse_GRL = lse_HT[:, rows].unflatten(0, (num_groups, -1))
        if q_THd.is_cpu:
            shared = (k_G1Ld.expand_as(q_GRLd), v_G1Ld.expand_as(q_GRLd))
            tensors = (grad_GRLd, q_GRLd, *shared, out_GRLd)
            if q_GRLd.shape[2] <= LONGEST_IN_FP32:
                tensors = tuple(tensor.float() for tensor in tensors)
            dq_GRLd, dk_GRLd, dv_GRLd = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, lse_GRL, 0.0, True, scale=packing.scale
            )
            parts = (dq_GRLd, dk_GRLd.sum(1, keepdim=True), dv_GRLd.sum(1, keepdim=True))
        else:
            parts = plain_backward(grad_GRLd, q_GRLd, k_G1Ld, v_G1Ld, out_GRLd, lse_GRL, packing.scale)
        for gradient, part in zip(gradients, parts, strict=True):
            grouped(gradient[rows], num_groups).copy_(part)
    return gradients


def grouped(heads_Lhd: Tensor, num_groups: int) -> Tensor:
    """View (L, h, d) as (G, h / G, L, d)."""
    return heads_Lhd.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)


def plain_forward(q_GRLd: Tensor, k_G1Ld: Tensor, v_G1Ld: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax in fp32, some rows at a time."""
    out_GRLd, lse_GRL = torch.empty_like(q_GRLd), q_GRLd.new_empty(q_GRLd.shape[:-1], dtype=torch.float32)
    for rows in row_blocks(q_GRLd):
        scores_GRCL = causal_scores(q_GRLd, k_G1Ld, rows, scale)
        lse_GRL[:, :, rows] = scores_GRCL.logsumexp(-1)
        out_GRLd[:, :, rows] = scores_GRCL.softmax(-1) @ v_G1Ld[:, :, : rows.stop].float()
    return out_GRLd, lse_GRL


def plain_backward(grad_GRLd, q_GRLd, k_G1Ld, v_G1Ld, out_GRLd, lse_GRL, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the scores made again: ds = p (dp - sum(dout out)) * scale (Dao et al. 2022, arXiv 2205.14135, appendix B.2)."""
    dq_GRLd = torch.empty_like(q_GRLd)
    dk_G1Ld, dv_G1Ld = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (k_G1Ld, v_G1Ld))
    for rows in row_blocks(q_GRLd):
        keys = slice(rows.stop)
        grad_GRCd = grad_GRLd[:, :, rows].float()
        weights_GRCL = (causal_scores(q_GRLd, k_G1Ld, rows, scale) - lse_GRL[:, :, rows, None]).exp()
        mean_GRC1 = (grad_GRCd * out_GRLd[:, :, rows]).sum(-1, keepdim=True)
        dscores_GRCL = weights_GRCL * (grad_GRCd @ v_G1Ld[:, :, keys].float().mT - mean_GRC1) * scale
        dq_GRLd[:, :, rows] = dscores_GRCL @ k_G1Ld[:, :, keys].float()
        dk_G1Ld[:, :, keys] += (dscores_GRCL.mT @ q_GRLd[:, :, rows].float()).sum(1, keepdim=True)
        dv_G1Ld[:, :, keys] += (weights_GRCL.mT @ grad_GRCd).sum(1, keepdim=True)
    return dq_GRLd, dk_G1Ld, dv_G1Ld


def row_blocks(q_GRLd: Tensor) -> Iterator[slice]:
    """Blocks of rows whose scores fit into `MAX_SCORES`."""
    num_groups, repeats, length, _ = q_GRLd.shape
    step = max(1, MAX_SCORES // (num_groups * repeats * length))
    return (slice(start, start + step) for start in range(0, length, step))


def causal_scores(q_GRLd: Tensor, k_G1Ld: Tensor, rows: slice, scale: float) -> Tensor:
    """Scores of `rows` against the keys up to their last, -inf behind each row's own."""
    scores_GRCL = q_GRLd[:, :, rows].float() @ k_G1Ld[:, :, : rows.stop].float().mT * scale
    hidden_CL = torch.ones(scores_GRCL.shape[-2:], dtype=torch.bool, device=scores_GRCL.device).triu(rows.start + 1)
    return scores_GRCL.masked_fill(hidden_CL, float("-inf"))


# Gradients that a library writes into


def empty_like(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, whatever the strides of `tensors` are."""
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def named(gradients: list[Tensor]) -> dict[str, Tensor]:
    """What flash-attn 2, 3 and 4 call them."""
    return dict(zip(("dq", "dk", "dv"), gradients, strict=True))
