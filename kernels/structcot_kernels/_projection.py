"""A group of projections that read the same input, each with a low-rank adapter or none: forward and backward by hand.

    y = residual + x W^T + bias + s drop(x) A^T B^T
    dS = s dy B,   dx = dy W + drop'(dS A),   dA = dS^T drop(x),   dB = s dy^T S,   where S = drop(x) A^T

Base products are the library's, on weights as they lie in memory. The low-rank product rides in them as the matrix that they add to:
`low_rank_up` fills a buffer with residual, bias and s S B^T, and x W^T then accumulates on it. The As of a group lie under one another, so
x is read once for all of them, forward and backward. Parameters of another dtype than x (fp32 masters) are rounded to it where they are
used; their gradients come back in their own.

Legend: T tokens, K inputs, N outputs, R adapter rank (in S and dS those of the whole group side by side).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structcot_kernels.checks import need_like, need_shape
from structcot_kernels.low_rank import low_rank_down, low_rank_grad, low_rank_up, need_keys
from structcot_kernels.reference import Projection

RECOMPUTE = ("none", "block", "full")


def need_projections(
    operation: str,
    like_TD: Tensor,
    num_inputs: int,
    projections: dict[str, Projection],
    dropout: float,
    keys_T: Tensor | None,
) -> None:
    """Refuse what does not fit together: projections of `num_inputs` inputs, on tokens, device and dtype as those of `like_TD`.

    Raises:
        ValueError: naming the operation, the tensor and what it must be.
        TypeError: if a tensor is no float of a known kind, or sharded.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{operation}: dropout is {dropout}; use a share of the inputs from 0 to below 1")
    need_like(operation, like_TD)
    for name, (weight_NK, bias_N, lora_a_RK, lora_b_NR, _) in projections.items():
        need_shape(operation, f"{name} weight_NK", weight_NK, (-1, num_inputs))
        num_outputs = weight_NK.shape[0]
        if bias_N is not None:
            need_shape(operation, f"{name} bias_N", bias_N, (num_outputs,))
        if (lora_a_RK is None) != (lora_b_NR is None):
            raise ValueError(f"{operation}: {name} has only one of lora_a_RK and lora_b_NR; give both or neither")
        if lora_a_RK is not None and lora_b_NR is not None:
            need_shape(operation, f"{name} lora_a_RK", lora_a_RK, (-1, num_inputs))
            need_shape(operation, f"{name} lora_b_NR", lora_b_NR, (num_outputs, lora_a_RK.shape[0]))
        for part, tensor in (("weight_NK", weight_NK), ("bias_N", bias_N), ("lora_a_RK", lora_a_RK), ("lora_b_NR", lora_b_NR)):
            if tensor is not None:
                need_like(operation, tensor)
                if tensor.device != like_TD.device:
                    raise ValueError(
                        f"{operation}: {name} {part} lies on {tensor.device}; it must lie on {like_TD.device}, as the input does"
                    )
    if dropout > 0.0 and any(ranks_of(list(projections.values()))):
        need_keys(operation, keys_T, like_TD)


def need_recompute(operation: str, recompute: str) -> None:
    """Refuse a word that is no rung of the ladder.

    Raises:
        ValueError: if `recompute` is none of them.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"{operation}: recompute is {recompute!r}; use one of {', '.join(RECOMPUTE)}")


def flatten(projections: Sequence[Projection]) -> list[Tensor | None]:
    """Weight, bias, A and B of each, in order: what an autograd function takes."""
    return [tensor for projection in projections for tensor in projection[:4]]


def unflatten(tensors: Sequence[Tensor | None], scales: Sequence[float]) -> list[Projection]:
    """The inverse of `flatten`."""
    return [Projection(*tensors[4 * index : 4 * index + 4], scale) for index, scale in enumerate(scales)]  # type: ignore[arg-type]


def ranks_of(projections: Sequence[Projection]) -> list[int]:
    """Rank of each adapter; 0 where there is none."""
    return [0 if projection.lora_a_RK is None else projection.lora_a_RK.shape[0] for projection in projections]


def rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter in the dtype of the computation."""
    return None if tensor is None else tensor.to(dtype)


def side_by_side(parts_TR: Sequence[Tensor], like_TK: Tensor) -> Tensor:
    """(T, sum of R) of a group; a single part as it is, none as (T, 0)."""
    if not parts_TR:
        return like_TK.new_empty((like_TK.shape[0], 0))
    return parts_TR[0] if len(parts_TR) == 1 else torch.cat(parts_TR, dim=1)


def stacked_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    """The As of a group under one another (sum of R, K); None if there is none."""
    parts_RK = [projection.lora_a_RK.to(dtype) for projection in projections if projection.lora_a_RK is not None]
    return None if not parts_RK else parts_RK[0] if len(parts_RK) == 1 else torch.cat(parts_RK)


# Forward


def low_rank_inputs(x_TK: Tensor, projections: Sequence[Projection], dropout: float, keys_T: Tensor | None) -> Tensor:
    """S (T, sum of R): what every adapter of the group makes of x by its A."""
    a_RK = stacked_a(projections, x_TK.dtype)
    return side_by_side([], x_TK) if a_RK is None else low_rank_down(x_TK, a_RK, dropout, keys_T)


def project_forward(x_TK: Tensor, projection: Projection, s_TR: Tensor, residual_TN: Tensor | None = None) -> Tensor:
    """Y (T, N) from x and this projection's own S."""
    weight, bias, _, b = (rounded(tensor, x_TK.dtype) for tensor in projection[:4])
    if b is not None:
        return low_rank_up(s_TR, b, projection.scale, residual_TN, bias).addmm_(x_TK, weight.T)  # type: ignore[union-attr]
    if residual_TN is None:
        return F.linear(x_TK, weight, bias)  # type: ignore[arg-type]
    return torch.addmm(residual_TN if bias is None else residual_TN + bias, x_TK, weight.T)  # type: ignore[union-attr]


def project_group(x_TK: Tensor, projections: Sequence[Projection], s_TR: Tensor) -> list[Tensor]:
    """Y (T, N) of every projection of a group."""
    parts_TR = s_TR.split(ranks_of(projections), dim=1)
    return [project_forward(x_TK, projection, part_TR) for projection, part_TR in zip(projections, parts_TR, strict=True)]


# Backward


def low_rank_output_grads(grads_TN: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor:
    """dS (T, sum of R), each adapter's scale in it."""
    parts_TR = [
        (grad_TN @ projection.lora_b_NR.to(grad_TN.dtype)).mul_(projection.scale)
        for grad_TN, projection in zip(grads_TN, projections, strict=True)
        if projection.lora_b_NR is not None
    ]
    return side_by_side(parts_TR, grads_TN[0])


def project_input_grad(
    grads_TN: Sequence[Tensor], projections: Sequence[Projection], ds_TR: Tensor, dropout: float, keys_T: Tensor | None
) -> Tensor:
    """dx (T, K), summed over the group."""
    dtype = grads_TN[0].dtype
    a_RK = stacked_a(projections, dtype)
    dx_TK = None if a_RK is None else low_rank_up(ds_TR, a_RK.T, 1.0, None, None, dropout, keys_T)
    for grad_TN, projection in zip(grads_TN, projections, strict=True):
        weight_NK = projection.weight_NK.to(dtype)
        dx_TK = grad_TN @ weight_NK if dx_TK is None else dx_TK.addmm_(grad_TN, weight_NK)
    return dx_TK  # type: ignore[return-value]


def project_parameter_grads(
    x_TK: Tensor | None,
    grads_TN: Sequence[Tensor],
    projections: Sequence[Projection],
    s_TR: Tensor,
    ds_TR: Tensor,
    dropout: float,
    keys_T: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of weight, bias, A and B of each projection, in the parameters' dtypes; None where `needs` (in that order) says so.

    x may be missing where no weight and no A is needed.
    """
    ranks = ranks_of(projections)
    wants_a = any(needs[2::4])
    das_RK = low_rank_grad(ds_TR, x_TK, 1.0, False, dropout, keys_T).split(ranks) if wants_a else [None] * len(ranks)
    grads: list[Tensor | None] = []
    for index, (grad_TN, projection, part_TR) in enumerate(zip(grads_TN, projections, s_TR.split(ranks, dim=1), strict=True)):
        need_weight, need_bias, need_a, need_b = needs[4 * index : 4 * index + 4]
        grads += [
            grad_TN.T @ x_TK if need_weight else None,  # type: ignore[operator]
            grad_TN.sum(0, dtype=torch.float32) if need_bias else None,
            das_RK[index] if need_a else None,
            low_rank_grad(part_TR, grad_TN, projection.scale, True) if need_b else None,
        ]
    return [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, flatten(projections), strict=True)]  # type: ignore[union-attr]
