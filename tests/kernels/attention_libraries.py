"""Stand-ins for the attention libraries that run on a GPU alone: their parameters as released, and the plain formula behind them.

A stand-in refuses a call that the real function would refuse or misread: unknown or missing parameters, options other than the defaults
where this project has no use for them, a wrong mask, borders or lengths that do not fit, a log-sum-exp of another shape.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

# flash-attn-4 4.0.0b36, flash_attn/cute/interface.py
FLASH_4_FORWARD = """q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
    window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384, num_splits=1,
    pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None, lse=None,
    aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
    seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False"""
FLASH_4_BACKWARD = """q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2,
    SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False,
    cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
    block_sparse_tensors=None, dlse=None, learnable_sink=None"""
# flash_attn_3 3.0.0, hopper/flash_attn_interface.py at 0251105a
FLASH_3_FORWARD = """q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
    seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None,
    rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"""
FLASH_3_BACKWARD = """dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1,
    window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0"""
# flash-attn 2.7.0, flash_attn/flash_attn_interface.py; 2.7.3 to 2.8.3.post1 have zero_tensors=False behind both
FLASH_2_FORWARD = """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left=-1,
    window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None"""
FLASH_2_BACKWARD = """dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None"""

USED = {"q", "k", "v", "out", "dout", "lse", "softmax_lse", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"}
USED |= {"max_seqlen_k", "softmax_scale", "causal", "is_causal", "deterministic", "return_lse", "window_size_left", "window_size_right"}
NEUTRAL = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None}

Function = Callable[[SimpleNamespace], object]


class Libraries:
    """The stand-ins, with a record of what was called and which backward was asked to be deterministic."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.deterministic: list[bool] = []

    def modules(self) -> dict[str, ModuleType]:
        """By the names under which they are imported."""
        flash_2 = self.module(
            _flash_attn_varlen_forward=(FLASH_2_FORWARD, lambda call: (*forward_of(call), torch.empty(0), torch.empty(2))),
            _flash_attn_varlen_backward=(FLASH_2_BACKWARD, lambda call: self.backward_of(call, call.softmax_lse, call.causal)),
        )
        flash_3 = self.module(
            _flash_attn_forward=(FLASH_3_FORWARD, lambda call: (*forward_of(call), torch.empty(0), torch.empty(0))),
            _flash_attn_backward=(FLASH_3_BACKWARD, lambda call: self.backward_of(call, call.softmax_lse, call.is_causal)),
        )
        flash_4 = self.module(
            _flash_attn_fwd=(FLASH_4_FORWARD, lambda call: (*(forward_of(call) if call.return_lse else (None, None)), None, None, None)),
            _flash_attn_bwd=(FLASH_4_BACKWARD, lambda call: self.backward_of(call, call.lse, call.causal)),
        )
        return {
            "flash_attn": ModuleType("flash_attn"),
            "flash_attn.flash_attn_interface": flash_2,
            "flash_attn_interface": flash_3,
            "flash_attn.cute": ModuleType("flash_attn.cute"),
            "flash_attn.cute.interface": flash_4,
        }

    def module(self, **functions: tuple[str, Function]) -> ModuleType:
        """A module of functions that take exactly the parameters of their text."""
        module = ModuleType("stand-in")
        for name, (parameters, function) in functions.items():
            setattr(module, name, self.function(name, parameters, function))
        return module

    def function(self, name: str, parameters: str, function: Function) -> Callable[..., object]:
        signature = inspect.signature(eval(f"(lambda {parameters}: None)"))

        def call(*args: object, **kwargs: object) -> object:
            bound = signature.bind(*args, **kwargs)
            for given, value in bound.arguments.items():
                default = NEUTRAL.get(given, signature.parameters[given].default)
                assert given in USED or value == default, f"{name}: {given} is {value}"
            bound.apply_defaults()
            self.calls.append(name)
            return function(SimpleNamespace(**bound.arguments))

        return call

    def backward_of(self, call: SimpleNamespace, lse_HT: Tensor, causal: bool) -> None:
        """Write dq, dk and dv, as the real ones do."""
        need_call(call, causal)
        self.deterministic.append(call.deterministic)
        assert lse_HT.shape == call.q.shape[1::-1]
        assert lse_HT.dtype == torch.float32
        operands = (call.dout, call.q, call.k, call.v, call.out, lse_HT, call.cu_seqlens_q, call.softmax_scale)
        for gradient, values in zip((call.dq, call.dk, call.dv), exact_backward(*operands), strict=True):
            assert gradient.is_contiguous()
            gradient.copy_(values)


@contextmanager
def stand_ins() -> Iterator[Libraries]:
    """Have the stand-ins imported instead of the libraries, and torch's own operators below varlen_attn run on a CPU."""
    libraries = Libraries()
    with mock.patch.dict(sys.modules, libraries.modules()), torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", torch_forward, "CPU")
        library.impl("_flash_attention_backward", torch_backward, "CPU")
        yield libraries


def need_call(call: SimpleNamespace, causal: bool) -> None:
    """Self-attention, causal, over borders that fit."""
    assert causal is True
    assert (call.window_size_left, call.window_size_right) in {(None, None), (-1, -1), (-1, 0)}
    need_borders(call.q, call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
    for tensor in (call.q, call.k, call.v):
        assert tensor.stride(-1) == 1


def need_borders(q_THd: Tensor, borders_q: Tensor, borders_k: Tensor, longest_q: int, longest_k: int) -> None:
    assert borders_q.dtype == torch.int32
    assert torch.equal(borders_q, borders_k)
    assert int(borders_q[-1]) == q_THd.shape[0]
    assert longest_q == longest_k == int(borders_q.diff().max())


def forward_of(call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    need_call(call, call.causal)
    return exact_forward(call.q, call.k, call.v, call.cu_seqlens_q, call.softmax_scale)


def torch_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, **others,
):  # fmt: skip
    """aten::_flash_attention_forward, torch 2.13."""
    assert is_causal
    assert (dropout_p, return_debug_mask, window_size_left, window_size_right) == (0.0, False, -1, 0)
    assert all(value is None for value in others.values())
    need_borders(query, cum_seq_q, cum_seq_k, max_q, max_k)
    nothing = torch.empty(0)
    return *exact_forward(query, key, value, cum_seq_q, scale), nothing, nothing, nothing


def torch_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
    scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """aten::_flash_attention_backward, torch 2.13."""
    assert is_causal
    assert (dropout_p, window_size_left, window_size_right) == (0.0, -1, 0)
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.uint64)
    need_borders(query, cum_seq_q, cum_seq_k, max_q, max_k)
    gradients = exact_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, scale)
    return tuple(torch.empty_like(like).copy_(gradient) for like, gradient in zip((query, key, value), gradients, strict=True))


def exact_forward(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, borders: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output in the memory layout of q, as the libraries make it, and log-sum-exp (H, T)."""
    out_THd, lse_HT = torch.empty_like(q_THd), q_THd.new_empty(q_THd.shape[1::-1], dtype=torch.float32)
    for start, end in itertools.pairwise(borders.tolist()):
        scores_HLL, _, v_HLd = document(q_THd, k_TGd, v_TGd, slice(start, end), scale)
        lse_HT[:, start:end] = scores_HLL.logsumexp(-1)
        out_THd[start:end] = (scores_HLL.softmax(-1) @ v_HLd).transpose(0, 1).to(out_THd.dtype)
    return out_THd, lse_HT


def exact_backward(grad_THd, q_THd, k_TGd, v_TGd, out_THd, lse_HT, borders: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64, from the output and log-sum-exp that were handed in."""
    dq, dk, dv = (torch.zeros(tensor.shape, dtype=torch.float64) for tensor in (q_THd, k_TGd, v_TGd))
    repeats = q_THd.shape[1] // k_TGd.shape[1]
    for start, end in itertools.pairwise(borders.tolist()):
        rows = slice(start, end)
        scores_HLL, k_HLd, v_HLd = document(q_THd, k_TGd, v_TGd, rows, scale)
        grad_HLd, out_HLd, q_HLd = (tensor[rows].transpose(0, 1).double() for tensor in (grad_THd, out_THd, q_THd))
        weights = (scores_HLL - lse_HT[:, rows, None].double()).exp()
        dscores = weights * (grad_HLd @ v_HLd.mT - (grad_HLd * out_HLd).sum(-1, keepdim=True)) * scale
        dq[rows] = (dscores @ k_HLd).transpose(0, 1)
        dk[rows] = (dscores.mT @ q_HLd).unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
        dv[rows] = (weights.mT @ grad_HLd).unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    return dq, dk, dv


def document(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, rows: slice, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores (H, L, L), and keys and values (H, L, d) of one document in fp64."""
    repeats = q_THd.shape[1] // k_TGd.shape[1]
    q_HLd = q_THd[rows].transpose(0, 1).double()
    k_HLd, v_HLd = (tensor[rows].transpose(0, 1).double().repeat_interleave(repeats, dim=0) for tensor in (k_TGd, v_TGd))
    scores_HLL = q_HLd @ k_HLd.mT * scale
    return scores_HLL.masked_fill(torch.ones_like(scores_HLL, dtype=torch.bool).triu(1), float("-inf")), k_HLd, v_HLd
