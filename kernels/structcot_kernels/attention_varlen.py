"""Causal attention inside each document of a packed sequence. The kernels are libraries'; here they are chosen, and made one operator.

    out_i = sum over j <= i of the same document of softmax_j(scale * q_i k_j) v_j

Query head h reads key-value head h * G // H. Legend: T packed tokens, S documents, H query heads, G key-value heads, d head width. The
documents lie end to end in T; `cu_seqlens_S1` holds their S + 1 borders, from 0 to T. The forward hands out the log-sum-exp of every
row, so that a caller that keeps it with the output differentiates by `attention_backward` alone and attention never runs twice.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from importlib import import_module, metadata
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

from structcot_kernels import _attention_backends as backends
from structcot_kernels._attention_backends import Packing
from structcot_kernels._cost import Cost, register_cost, size_bytes
from structcot_kernels.checks import need_like, need_rows, need_shape


def attention_varlen(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_seqlens_S1: Tensor, max_seqlen: int, scale: float, implementation: str = "auto"
) -> Tensor:
    """Causal softmax(q k^T * scale) v inside each document, (T, H, d); no token sees another document.

    `cu_seqlens_S1` is int32 and lies where q does, `max_seqlen` is the longest document; documents may be empty. Only on a CPU are the
    borders checked: reading them would make a GPU wait. `implementation` is a name that `choose_attention` takes.

    Raises:
        ValueError: if a shape, stride, device or border does not fit, or `implementation` is no name of one.
        TypeError: if a dtype does not fit.
        RuntimeError: if the implementation cannot run here.
    """
    need_operands("attention_varlen", q_THd, k_TGd, v_TGd, cu_seqlens_S1)
    chosen = choose_attention(implementation, q_THd.device, q_THd.dtype, q_THd.shape[2])
    return attention_forward(q_THd, k_TGd, v_TGd, cu_seqlens_S1, max_seqlen, scale, chosen)[0]


# The choice


class Library(NamedTuple):
    """A library of attention kernels for GPUs: its package, the oldest version that has what is called, and what it runs on."""

    package: str
    oldest: str
    module: str
    capabilities: Collection[int]
    remedy: str


LIBRARIES = {
    "flash_attention_4": Library(
        "flash-attn-4", "4.0.0b36", "flash_attn.cute.interface", (9, 10), "pip install --pre --upgrade flash-attn-4"
    ),
    "flash_attention_3": Library(
        "flash-attn-3", "3.0.0", "flash_attn_interface", (9,), "build hopper/ of github.com/Dao-AILab/flash-attention"
    ),
    "flash_attention_2": Library(
        "flash-attn", "2.7.0", "flash_attn.flash_attn_interface", range(8, 13), "pip install --upgrade --no-build-isolation flash-attn"
    ),
    "varlen": Library("torch", "2.11.0", "torch.nn.attention.varlen", range(8, 13), "install torch 2.11 or newer"),
}
"""In order of preference. `capabilities` are major compute capabilities of GPUs."""

FORWARDS = {
    "flash_attention_4": backends.flash_4_forward,
    "flash_attention_3": backends.flash_3_forward,
    "flash_attention_2": backends.flash_2_forward,
    "varlen": backends.varlen_forward,
    "sdpa": backends.sdpa_forward,
}
BACKWARDS = {
    "flash_attention_4": backends.flash_4_backward,
    "flash_attention_3": backends.flash_3_backward,
    "flash_attention_2": backends.flash_2_backward,
    "varlen": backends.varlen_backward,
    "sdpa": backends.sdpa_backward,
}


@torch.compiler.assume_constant_result
def choose_attention(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What computes attention of such heads: `implementation` itself, or for "auto" the first of `LIBRARIES` that can, then "sdpa".

    On a CPU that is "sdpa", PyTorch's own kernel, one document after the other. On a GPU "sdpa" is a plain computation in fp32, for
    checks and for heads that no library takes. On the device `meta` nothing runs, and every name is good.

    Raises:
        ValueError: if `implementation` is no name of one.
        RuntimeError: if it was named and cannot run, saying why and what to do.
    """
    if implementation not in ("auto", *FORWARDS):
        raise ValueError(f'attention_varlen: got implementation "{implementation}"; use one of auto, {", ".join(FORWARDS)}')
    if device.type == "meta" and implementation != "auto":
        return implementation
    obstacles = {name: find_obstacle(name, device, dtype, head_dim) for name in FORWARDS}
    usable = next(name for name, obstacle in obstacles.items() if obstacle is None)
    if implementation == "auto":
        return usable
    if obstacles[implementation] is not None:
        raise RuntimeError(
            f'attention_varlen: "{implementation}" was asked for and cannot run: {obstacles[implementation]};'
            f' otherwise choose "auto", which is "{usable}" here'
        )
    return implementation


def describe_attention(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """One sentence to print: what `choose_attention` chose, of which version, and on a GPU why nothing that "auto" prefers.

    Raises:
        ValueError: as `choose_attention` does.
        RuntimeError: as `choose_attention` does.
    """
    chosen = choose_attention(implementation, device, dtype, head_dim)
    package = LIBRARIES[chosen].package if chosen in LIBRARIES else "torch"
    sentence = f"attention: {chosen} ({package} {installed_version(package)})"
    if implementation != "auto" or device.type != "cuda":
        return sentence
    preferred = list(FORWARDS)[: list(FORWARDS).index(chosen)]
    return "; ".join([sentence, *(f"no {name}: {find_obstacle(name, device, dtype, head_dim)}" for name in preferred)])


@functools.cache
def find_obstacle(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `implementation` cannot compute such heads, with what to do about it, or None if it can."""
    if implementation == "sdpa":
        return None
    package, oldest, module, capabilities, remedy = LIBRARIES[implementation]
    if device.type != "cuda":
        return f"it needs a GPU, and the tensors lie on {device}"
    if not torch.cuda.is_available():
        return "it needs a GPU, and CUDA finds none here"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in capabilities:
        return f"it runs on compute capability {', '.join(f'{number}.x' for number in capabilities)}, and {device} has {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not in {dtype}"
    limit = 128 if implementation == "flash_attention_4" and major == 10 and head_dim != 256 else 256
    if head_dim % 8 or not 0 < head_dim <= limit:
        return f"it takes head widths that are multiples of 8 up to {limit}, not {head_dim}"
    version = installed_version(package)
    if version is None:
        return f"the package {package} is not installed ({remedy})"
    if version < TorchVersion(oldest):
        return f"{package} {version} is too old; it must be {oldest} or newer ({remedy})"
    try:
        import_module(module)
    except ImportError as error:
        return f"{package} {version} is installed but cannot be imported: {error} ({remedy})"
    return None


def installed_version(package: str) -> TorchVersion | None:
    """Of a package, or None if there is none of that name."""
    try:
        return TorchVersion(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


# Operators


@torch.library.custom_op("structcot::attention_forward", mutates_args=())
def attention_forward(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_seqlens_S1: Tensor, max_seqlen: int, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """Output (T, H, d) and log-sum-exp (H, T) in fp32, by an implementation that `choose_attention` returned."""
    need_operands("attention_forward", q_THd, k_TGd, v_TGd, cu_seqlens_S1)
    need_chosen("attention_forward", implementation)
    if q_THd.is_cpu:
        need_borders("attention_forward", cu_seqlens_S1, q_THd.shape[0], max_seqlen)
    if not q_THd.shape[0]:
        return q_THd.new_empty(q_THd.shape), row_sums(q_THd)
    out_THd, lse_HT = FORWARDS[implementation](q_THd, k_TGd, v_TGd, Packing(cu_seqlens_S1, max_seqlen, scale))
    return out_THd.contiguous(), lse_HT.contiguous()


@torch.library.custom_op("structcot::attention_backward", mutates_args=())
def attention_backward(
    grad_THd: Tensor,
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    out_THd: Tensor,
    lse_HT: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, H, d), k and v (T, G, d), from what `attention_forward` returned by the same implementation."""
    need_operands("attention_backward", q_THd, k_TGd, v_TGd, cu_seqlens_S1)
    need_chosen("attention_backward", implementation)
    for name, tensor in (("grad_THd", grad_THd), ("out_THd", out_THd)):
        need_shape("attention_backward", name, tensor, q_THd.shape)
    need_like("attention_backward", q_THd, grad_THd=grad_THd, out_THd=out_THd)
    need_rows("attention_backward", grad_THd=grad_THd, out_THd=out_THd)
    need_shape("attention_backward", "lse_HT", lse_HT, (q_THd.shape[1], q_THd.shape[0]))
    if not q_THd.shape[0]:
        dq_THd, dk_TGd, dv_TGd = backends.empty_like(q_THd, k_TGd, v_TGd)
    else:
        packing = Packing(cu_seqlens_S1, max_seqlen, scale)
        dq_THd, dk_TGd, dv_TGd = BACKWARDS[implementation](grad_THd, q_THd, k_TGd, v_TGd, out_THd, lse_HT, packing)
    return dq_THd.contiguous(), dk_TGd.contiguous(), dv_TGd.contiguous()


def need_operands(operation: str, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_seqlens_S1: Tensor) -> None:
    """Refuse what the kernels would misread."""
    need_shape(operation, "q_THd", q_THd, (-1, -1, -1))
    num_tokens, num_heads, head_dim = q_THd.shape
    need_shape(operation, "k_TGd", k_TGd, (num_tokens, -1, head_dim))
    need_shape(operation, "v_TGd", v_TGd, k_TGd.shape)
    need_like(operation, q_THd, k_TGd=k_TGd, v_TGd=v_TGd)
    need_rows(operation, q_THd=q_THd, k_TGd=k_TGd, v_TGd=v_TGd)
    if not k_TGd.shape[1] or num_heads % k_TGd.shape[1]:
        raise ValueError(f"{operation}: {num_heads} query heads cannot share {k_TGd.shape[1]} key-value heads evenly; give H = G * R heads")
    need_shape(operation, "cu_seqlens_S1", cu_seqlens_S1, (-1,))
    if isinstance(cu_seqlens_S1, DTensor) or cu_seqlens_S1.dtype != torch.int32 or cu_seqlens_S1.device != q_THd.device:
        raise TypeError(
            f"{operation}: cu_seqlens_S1 is a {type(cu_seqlens_S1).__name__} of {cu_seqlens_S1.dtype} on {cu_seqlens_S1.device};"
            f" it must be a Tensor of torch.int32 on {q_THd.device}, as q is"
        )


def need_chosen(operation: str, implementation: str) -> None:
    """Refuse a name that is none, and "auto", which `choose_attention` turns into one."""
    if implementation not in FORWARDS:
        raise ValueError(f'{operation}: got implementation "{implementation}"; give what choose_attention returned')


def need_borders(operation: str, cu_seqlens_S1: Tensor, num_tokens: int, max_seqlen: int) -> None:
    """Refuse borders that do not rise from 0 to T, and documents longer than `max_seqlen`. Reads the borders."""
    lengths_S = cu_seqlens_S1.diff()
    spans_all = cu_seqlens_S1.numel() > 0 and int(cu_seqlens_S1[0]) == 0 and int(cu_seqlens_S1[-1]) == num_tokens
    if not spans_all or bool((lengths_S < 0).any()):
        raise ValueError(f"{operation}: cu_seqlens_S1 is {cu_seqlens_S1.tolist()}; it must rise from 0 to the {num_tokens} tokens of q")
    if lengths_S.numel() and int(lengths_S.max()) > max_seqlen:
        raise ValueError(f"{operation}: max_seqlen is {max_seqlen}, and a document has {int(lengths_S.max())} tokens; give the longest")


# What torch.compile, fake tensors and autograd need to know


def row_sums(q_THd: Tensor) -> Tensor:
    """Empty (H, T) in fp32."""
    return q_THd.new_empty((q_THd.shape[1], q_THd.shape[0]), dtype=torch.float32)


@attention_forward.register_fake
def _(q_THd, k_TGd, v_TGd, cu_seqlens_S1, max_seqlen, scale, implementation):
    return q_THd.new_empty(q_THd.shape), row_sums(q_THd)


@attention_backward.register_fake
def _(grad_THd, q_THd, k_TGd, v_TGd, out_THd, lse_HT, cu_seqlens_S1, max_seqlen, scale, implementation):
    return tuple(backends.empty_like(q_THd, k_TGd, v_TGd))


def save_heads(ctx, inputs, output):
    """Keep q, k, v, the output and its log-sum-exp."""
    q_THd, k_TGd, v_TGd, cu_seqlens_S1, *ctx.options = inputs
    ctx.save_for_backward(q_THd, k_TGd, v_TGd, *output, cu_seqlens_S1)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def head_gradients(ctx, grad_THd, _):
    """For q, k and v; the rest is not differentiable."""
    return *attention_backward(grad_THd.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None


attention_forward.register_autograd(head_gradients, setup_context=save_heads)


# Cost: two products of (L, d) and (d, L) a head and document forward, of which the causal half counts, and five backward, one of them the
# scores again; exact where every document has `max_seqlen` tokens, else too much. Bytes are those of operands and results.


@register_cost(attention_forward)
def _(q_THd, k_TGd, v_TGd, cu_seqlens_S1, max_seqlen, scale, implementation):
    moved = size_bytes(q_THd, k_TGd, v_TGd, cu_seqlens_S1) + size_bytes(q_THd) + lse_bytes(q_THd)
    return [Cost(2.0 * q_THd.numel() * max_seqlen, moved)]


@register_cost(attention_backward)
def _(grad_THd, q_THd, k_TGd, v_TGd, out_THd, lse_HT, cu_seqlens_S1, max_seqlen, scale, implementation):
    moved = size_bytes(grad_THd, out_THd, lse_HT, cu_seqlens_S1) + 2 * size_bytes(q_THd, k_TGd, v_TGd)
    return [Cost(5.0 * q_THd.numel() * max_seqlen, moved)]


def lse_bytes(q_THd: Tensor) -> int:
    """Of the log-sum-exp, 4 a row and head."""
    return 4 * q_THd.shape[0] * q_THd.shape[1]
