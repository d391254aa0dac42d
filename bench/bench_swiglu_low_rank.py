"""SwiGLU with low-rank products inside, against those products one by one. Run as `python -m bench.bench_swiglu_low_rank`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, main
from structcot_kernels.swiglu_low_rank import swiglu_low_rank_backward, swiglu_low_rank_forward

SCALE = 2.0


def cases(device: torch.device) -> Iterator[Case]:
    """Forward and backward at the widths of SmolLM2 and Qwen2.5-32B."""
    shapes = [(16384, 27648, 64), (4096, 27648, 16)] if device.type == "cuda" else [(512, 1536, 16)]
    for num_rows, width, rank in shapes:
        sizes = [(num_rows, width)] * 3 + [(num_rows, 2 * rank), (width, rank), (width, rank), (num_rows, rank), (rank, width)]
        grad, gate, up, s, b_gate, b_up, ds, a = ((torch.randn(size, device=device) * 0.3).bfloat16() for size in sizes)
        shape = f"T={num_rows} F={width} R={rank} bfloat16"
        forward, backward = (gate, up, s, b_gate, b_up, SCALE, a), (grad, gate, up, s, b_gate, b_up, SCALE, ds, a)
        yield Case(
            operation="swiglu_low_rank forward",
            shape=shape,
            sides={
                "structcot": lambda operands=forward: swiglu_low_rank_forward(*operands),
                "torch": lambda operands=forward: plain_forward(*operands),
            },
        )
        yield Case(
            operation="swiglu_low_rank backward",
            shape=shape,
            sides={
                "structcot": lambda operands=backward: swiglu_low_rank_backward(*operands),
                "torch": lambda operands=backward: plain_backward(*operands),
            },
        )


def plain_forward(gate: Tensor, up: Tensor, s: Tensor, b_gate: Tensor, b_up: Tensor, scale: float, a: Tensor) -> tuple[Tensor, Tensor]:
    """A product and a pass over memory for each step."""
    s_gate, s_up = s.chunk(2, dim=1)
    act = F.silu(torch.addmm(gate, s_gate, b_gate.T, alpha=scale)) * torch.addmm(up, s_up, b_up.T, alpha=scale)
    return act, act @ a.T


def plain_backward(*operands) -> tuple[Tensor, ...]:
    """The same backwards, by hand."""
    grad, gate, up, s, b_gate, b_up, scale, ds, a = operands
    s_gate, s_up = s.chunk(2, dim=1)
    gate, up = torch.addmm(gate, s_gate, b_gate.T, alpha=scale), torch.addmm(up, s_up, b_up.T, alpha=scale)
    grad, silu = torch.addmm(grad, ds, a), F.silu(gate)
    grad_gate, grad_up = torch.ops.aten.silu_backward(grad * up, gate), grad * silu
    grad_b = torch.stack((scale * grad_gate.T @ s_gate, scale * grad_up.T @ s_up)).float()
    return grad_gate, grad_up, grad_b, (ds.T @ (silu * up)).float()


if __name__ == "__main__":
    main(cases)
