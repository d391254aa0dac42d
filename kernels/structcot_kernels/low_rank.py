"""The products of a low-rank adapter that no library makes as they are needed here, and their gradients.

    S = drop(x) A^T,   y = start + bias + scale drop'(S B^T),   dA = dS^T drop(x),   dB^T = scale S^T dy

`low_rank_up` fills the buffer that a projection's own product then adds to: bias, residual and adapter arrive in the sum by one pass.
Gradients are summed in fp32 over chunks of tokens in a fixed order, so two runs give the same bits. What is dropped is a hash of
(token's key, column) and found anew where it is needed (structcot_kernels.reference.keep_mask), whatever the tiling.

Any rank goes; nothing here is differentiable by itself: structcot_kernels.lora_linear and the blocks call it in their own backward.
Legend: T tokens, K inputs, N outputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structcot_kernels._cost import Cost, register_cost, size_bytes
from structcot_kernels.checks import need_like, need_rows, need_shape
from structcot_kernels.jit import low_rank as jit
from structcot_kernels.launch import cdiv, runs_triton
from structcot_kernels.reference import keep_mask


def low_rank_down(x_TK: Tensor, a_RK: Tensor, dropout: float = 0.0, keys_T: Tensor | None = None) -> Tensor:
    """S = drop(x) A^T (T, R); without dropout it is a product like any other, and the library's.

    Raises:
        ValueError: if a shape, stride or device does not fit, or there is dropout but no keys (T, int64).
        TypeError: if a dtype does not fit.
    """
    return x_TK @ a_RK.T if dropout == 0.0 else low_rank_down_dropped(x_TK, a_RK, dropout, need_keys("low_rank_down", keys_T, x_TK))


# Operators


@torch.library.custom_op("structcot::low_rank_down_dropped", mutates_args=())
def low_rank_down_dropped(x_TK: Tensor, a_RK: Tensor, dropout: float, keys_T: Tensor) -> Tensor:
    """S (T, R) of an input with dropout."""
    need_shape("low_rank_down", "a_RK", a_RK, (-1, x_TK.shape[1]))
    need_like("low_rank_down", x_TK, a_RK=a_RK)
    need_rows("low_rank_down", x_TK=x_TK, a_RK=a_RK)
    if runs_triton(x_TK):
        return jit.down(x_TK, a_RK, dropout, keys_T)
    return (dropped(x_TK, dropout, keys_T) @ a_RK.T).mul_(1.0 / (1.0 - dropout))


@torch.library.custom_op("structcot::low_rank_up", mutates_args=())
def low_rank_up(
    s_TR: Tensor,
    b_NR: Tensor,
    scale: float,
    start_TN: Tensor | None = None,
    bias_N: Tensor | None = None,
    dropout: float = 0.0,
    keys_T: Tensor | None = None,
) -> Tensor:
    """start + bias + scale * S B^T (T, N), the product with dropout if there are keys (T, int64); B may be a transposed view."""
    (num_rows, rank), num_columns = s_TR.shape, b_NR.shape[0]
    need_shape("low_rank_up", "b_NR", b_NR, (-1, rank))
    need_like("low_rank_up", s_TR, b_NR=b_NR, start_TN=start_TN, bias_N=bias_N)
    need_rows("low_rank_up", s_TR=s_TR, start_TN=start_TN, bias_N=bias_N)
    if start_TN is not None:
        need_shape("low_rank_up", "start_TN", start_TN, (num_rows, num_columns))
    if bias_N is not None:
        need_shape("low_rank_up", "bias_N", bias_N, (num_columns,))
    keys_T = need_keys("low_rank_up", keys_T, s_TR) if dropout > 0.0 else None
    if runs_triton(s_TR):
        return jit.up(s_TR, b_NR, scale, start_TN, bias_N, dropout, keys_T)
    return torch_up(s_TR, b_NR, scale, start_TN, bias_N, dropout, keys_T)


@torch.library.custom_op("structcot::low_rank_grad", mutates_args=())
def low_rank_grad(
    left_TR: Tensor, right_TN: Tensor, scale: float, transposed: bool, dropout: float = 0.0, keys_T: Tensor | None = None
) -> Tensor:
    """scale * left^T drop(right) in fp32: (R, N), or (N, R) if `transposed`."""
    need_shape("low_rank_grad", "right_TN", right_TN, (left_TR.shape[0], -1))
    need_like("low_rank_grad", left_TR, right_TN=right_TN)
    need_rows("low_rank_grad", left_TR=left_TR, right_TN=right_TN)
    keys_T = need_keys("low_rank_grad", keys_T, left_TR) if dropout > 0.0 else None
    if runs_triton(left_TR):
        return jit.grad(left_TR, right_TN, scale, dropout, keys_T, transposed)
    right = right_TN if keys_T is None else dropped(right_TN, dropout, keys_T)
    product = right.T @ left_TR if transposed else left_TR.T @ right
    return product.float().mul_(scale / (1.0 - dropout))


def need_keys(operation: str, keys_T: Tensor | None, rows: Tensor) -> Tensor:
    """The keys, which must be one int64 for each row.

    Raises:
        ValueError: if they are missing or of another shape.
        TypeError: if they are no int64.
    """
    if keys_T is None:
        raise ValueError(f"{operation}: there is dropout but dropout_keys_T is missing; give one int64 key for each token")
    need_shape(operation, "dropout_keys_T", keys_T, (rows.shape[0],))
    if keys_T.dtype != torch.int64:
        raise TypeError(f"{operation}: dropout_keys_T is {keys_T.dtype}; it must be torch.int64")
    return keys_T.contiguous()


def dropped(x_TK: Tensor, dropout: float, keys_T: Tensor) -> Tensor:
    """x with zeros where it is dropped, what stays not yet scaled up."""
    return x_TK * keep_mask(keys_T, x_TK.shape[1], dropout)


def torch_up(
    s_TR: Tensor, b_NR: Tensor, scale: float, start_TN: Tensor | None, bias_N: Tensor | None, dropout: float, keys_T: Tensor | None
) -> Tensor:
    """`low_rank_up` in PyTorch."""
    if keys_T is None:
        if start_TN is None and bias_N is None:
            return (s_TR @ b_NR.T).mul_(scale)
        start = bias_N if start_TN is None else start_TN if bias_N is None else start_TN + bias_N
        return torch.addmm(start, s_TR, b_NR.T, alpha=scale)  # type: ignore[arg-type]
    out_TN = dropped(s_TR @ b_NR.T, dropout, keys_T).mul_(scale / (1.0 - dropout))
    for addend in (start_TN, bias_N):
        if addend is not None:
            out_TN += addend
    return out_TN


# What torch.compile and fake tensors need to know


@low_rank_down_dropped.register_fake
def _(x_TK, a_RK, dropout, keys_T):
    return x_TK.new_empty((x_TK.shape[0], a_RK.shape[0]))


@low_rank_up.register_fake
def _(s_TR, b_NR, scale, start_TN=None, bias_N=None, dropout=0.0, keys_T=None):
    return s_TR.new_empty((s_TR.shape[0], b_NR.shape[0]))


@low_rank_grad.register_fake
def _(left_TR, right_TN, scale, transposed, dropout=0.0, keys_T=None):
    rank, num_columns = left_TR.shape[1], right_TN.shape[1]
    return left_TR.new_empty((num_columns, rank) if transposed else (rank, num_columns), dtype=torch.float32)


# Cost: beyond what must move, each column of programs reads S again and each row of them the factors


@register_cost(low_rank_down_dropped)
def _(x_TK, a_RK, dropout, keys_T):
    (num_rows, inner), rank = x_TK.shape, a_RK.shape[0]
    tile = jit.down_tile(rank)
    across, along = cdiv(num_rows, tile["BLOCK_T"]), cdiv(rank, tile["BLOCK_R"])
    moved = size_bytes(x_TK, a_RK, keys_T) + num_rows * rank * x_TK.element_size()
    again = (along - 1) * size_bytes(x_TK, keys_T) + (across - 1) * size_bytes(a_RK)
    return [Cost(2.0 * num_rows * inner * rank, moved, again)]


@register_cost(low_rank_up)
def _(s_TR, b_NR, scale, start_TN=None, bias_N=None, dropout=0.0, keys_T=None):
    (num_rows, rank), num_columns = s_TR.shape, b_NR.shape[0]
    keys_T = keys_T if dropout > 0.0 else None
    tile = jit.up_tile(rank)
    across, along = cdiv(num_rows, tile["BLOCK_T"]), cdiv(num_columns, tile["BLOCK_N"])
    moved = size_bytes(s_TR, b_NR, start_TN, bias_N, keys_T) + num_rows * num_columns * s_TR.element_size()
    again = (along - 1) * size_bytes(s_TR, keys_T) + (across - 1) * size_bytes(b_NR, bias_N)
    return [Cost(2.0 * num_rows * num_columns * rank, moved, again)]


@register_cost(low_rank_grad)
def _(left_TR, right_TN, scale, transposed, dropout=0.0, keys_T=None):
    (num_rows, rank), num_columns = left_TR.shape, right_TN.shape[1]
    keys_T = keys_T if dropout > 0.0 else None
    tile = jit.grad_tile(rank)
    across, along = cdiv(num_columns, tile["BLOCK_N"]), cdiv(rank, tile["BLOCK_R"])
    num_chunks, _ = jit.chunks_of(num_rows, num_columns, rank)
    result_bytes = 4 * num_columns * rank
    again = (along - 1) * size_bytes(right_TN) + (across - 1) * size_bytes(left_TR) + (across * along - 1) * size_bytes(keys_T)
    products = Cost(2.0 * num_rows * num_columns * rank, size_bytes(left_TR, right_TN, keys_T) + num_chunks * result_bytes, again)
    if num_chunks == 1:
        return [products]
    return [products, Cost(float(num_chunks * num_columns * rank), (num_chunks + 1) * result_bytes)]
