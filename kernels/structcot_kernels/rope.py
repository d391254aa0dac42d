"""Rotary positions: each head's two halves turned by the angle of its token's position, the table's row gathered inside.

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin,   and back by the opposite angle

Source: Su et al. 2021 (arXiv 2104.09864), in the half-split form of Llama. Legend: T tokens, H heads, d head width, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structcot_kernels._cost import Cost, register_cost, size_bytes
from structcot_kernels.checks import need_like, need_shape
from structcot_kernels.jit import rope as jit
from structcot_kernels.launch import cdiv, runs_triton


def rope(heads_THd: Tensor, positions_T: Tensor, cos_Pd: Tensor, sin_Pd: Tensor) -> Tensor:
    """Heads (T, H, d), turned; `positions_T` (int64) are rows of the tables (P, d), fp32, whose two halves are equal.

    Angles are applied in fp32 and the result rounded once. A position outside the tables gives nan, which shows, rather than a wrong angle.

    Raises:
        ValueError: if a shape, stride or device does not fit.
        TypeError: if a dtype does not fit.
    """
    return rope_forward(heads_THd, positions_T, cos_Pd, sin_Pd, False)


@torch.library.custom_op("structcot::rope_forward", mutates_args=())
def rope_forward(heads_THd: Tensor, positions_T: Tensor, cos_Pd: Tensor, sin_Pd: Tensor, inverse: bool) -> Tensor:
    """Heads turned, or turned back."""
    need_operands(heads_THd, positions_T, cos_Pd, sin_Pd)
    if runs_triton(heads_THd):
        return jit.forward(heads_THd, positions_T, cos_Pd, sin_Pd, inverse)
    return torch_forward(heads_THd, positions_T, cos_Pd, sin_Pd, inverse)


def need_operands(heads_THd: Tensor, positions_T: Tensor, cos_Pd: Tensor, sin_Pd: Tensor) -> None:
    """Refuse what the kernel would misread."""
    need_like("rope", heads_THd)
    need_shape("rope", "heads_THd", heads_THd, (-1, -1, -1))
    num_tokens, num_heads, width = heads_THd.shape
    need_shape("rope", "positions_T", positions_T, (num_tokens,))
    if width % 2:
        raise ValueError(f"rope: heads_THd are {width} wide; the width must be even, since halves are turned against each other")
    if positions_T.dtype != torch.int64:
        raise TypeError(f"rope: positions_T is {positions_T.dtype}; it must be torch.int64")
    for name, table in (("cos_Pd", cos_Pd), ("sin_Pd", sin_Pd)):
        need_shape("rope", name, table, (-1, width))
        if table.dtype != torch.float32:
            raise TypeError(f"rope: {name} is {table.dtype}; it must be torch.float32")
    need_shape("rope", "sin_Pd", sin_Pd, cos_Pd.shape)
    for name, tensor in (("positions_T", positions_T), ("cos_Pd", cos_Pd), ("sin_Pd", sin_Pd)):
        if tensor.device != heads_THd.device:
            raise ValueError(f"rope: {name} lies on {tensor.device}; it must lie on {heads_THd.device}, as the heads do")
        if not tensor.is_contiguous():
            raise ValueError(f"rope: {name} has strides {tensor.stride()}; call contiguous() first")
    side_by_side = heads_THd.stride(2) == 1 and (num_heads == 1 or heads_THd.stride(1) == width)
    if heads_THd.numel() and not side_by_side:
        raise ValueError(
            f"rope: heads_THd has strides {heads_THd.stride()}; a token's heads must lie side by side: call contiguous() first"
        )


def torch_forward(heads_THd: Tensor, positions_T: Tensor, cos_Pd: Tensor, sin_Pd: Tensor, inverse: bool) -> Tensor:
    """In PyTorch: angles rounded to the heads' dtype, so that no head is widened; two passes over the heads."""
    half, dtype, num_positions = heads_THd.shape[2] // 2, heads_THd.dtype, cos_Pd.shape[0]
    rows_T = positions_T.clamp(0, max(0, num_positions - 1))
    cos_T1d, sin_T1d = (table_Pd.index_select(0, rows_T).to(dtype).unsqueeze(1) for table_Pd in (cos_Pd, sin_Pd))
    cos_T1d.masked_fill_(((positions_T < 0) | (positions_T >= num_positions))[:, None, None], float("nan"))
    (sin_T1d[..., half:] if inverse else sin_T1d[..., :half]).neg_()
    out_THd = heads_THd * cos_T1d
    out_THd[..., :half].addcmul_(heads_THd[..., half:], sin_T1d[..., :half])
    out_THd[..., half:].addcmul_(heads_THd[..., :half], sin_T1d[..., half:])
    return out_THd


@rope_forward.register_fake
def _(heads_THd, positions_T, cos_Pd, sin_Pd, inverse):
    return torch.empty_like(heads_THd, memory_format=torch.contiguous_format)


def save_places(ctx, inputs, output):
    """Positions and tables are all that the backward needs."""
    _, positions_T, cos_Pd, sin_Pd, inverse = inputs
    ctx.save_for_backward(positions_T, cos_Pd, sin_Pd)
    ctx.inverse = inverse


def turn_back(ctx, grad_THd):
    """Gradient of the heads: a rotation's transpose is the rotation back."""
    return rope_forward(grad_THd.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None, None


rope_forward.register_autograd(turn_back, setup_context=save_places)


@register_cost(rope_forward)
def _(heads_THd, positions_T, cos_Pd, sin_Pd, inverse):
    num_tokens, num_heads, width = heads_THd.shape
    blocks = cdiv(num_heads, jit.tile_of(num_heads, width)["BLOCK_H"])
    tables = num_tokens * width * cos_Pd.element_size()  # half of each row of both, gathered
    once = size_bytes(positions_T) + tables
    return [Cost(3.0 * heads_THd.numel(), 2 * size_bytes(heads_THd) + once, (blocks - 1) * once)]
