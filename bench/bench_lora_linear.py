"""Projections with adapters, forward and backward, against PEFT's expression. Run as `python -m bench.bench_lora_linear`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, forward_backward, main
from structcot_kernels import Projection, lora_gate_up, lora_linear, lora_qkv

SCALE = 2.0


def cases(device: torch.device) -> Iterator[Case]:
    """One projection, q/k/v and gate/up: o_proj and its neighbours in SmolLM2 and Qwen2.5-32B."""
    for num_rows, hidden, keys, inner, rank in [(8192, 5120, 1024, 27648, 64)] if device.type == "cuda" else [(1024, 576, 192, 1536, 16)]:
        for name, operation, outputs in (
            ("lora_linear", one, [hidden]),
            ("lora_qkv", lora_qkv, [hidden, keys, keys]),
            ("lora_gate_up", lora_gate_up, [inner, inner]),
        ):
            x_TK = torch.randn(num_rows, hidden, device=device).bfloat16().requires_grad_()
            group = [random_projection(size, hidden, rank, device) for size in outputs]
            trained = adapters_of(*group)
            yield Case(
                operation=name,
                shape=f"T={num_rows} K={hidden} N={'+'.join(map(str, outputs))} R={rank} bfloat16",
                sides={
                    "structcot": forward_backward(lambda x, *_, call=operation, group=group: call(x, *group), x_TK, *trained),
                    "torch": forward_backward(lambda x, *_, group=group: tuple(plain(x, p) for p in group), x_TK, *trained),
                },
            )


def adapters_of(*projections: Projection) -> list[torch.Tensor]:
    """A and B of each."""
    return [tensor for projection in projections for tensor in (projection.lora_a_RK, projection.lora_b_NR) if tensor is not None]


def one(x_TK: Tensor, projection: Projection) -> Tensor:
    """A single projection, called as the groups are."""
    return lora_linear(x_TK, *projection)


def plain(x_TK: Tensor, projection: Projection) -> Tensor:
    """What PEFT computes."""
    weight_NK, bias_N, a_RK, b_NR, scale = projection
    return F.linear(x_TK, weight_NK, bias_N) + F.linear(F.linear(x_TK, a_RK), b_NR) * scale  # type: ignore[arg-type]


def random_projection(num_outputs: int, num_inputs: int, rank: int, device: torch.device) -> Projection:
    """A frozen weight with an adapter that is trained, bf16."""
    weight_NK, a_RK, b_NR = (
        (torch.randn(shape, device=device) * shape[1] ** -0.5).bfloat16()
        for shape in ((num_outputs, num_inputs), (rank, num_inputs), (num_outputs, rank))
    )
    return Projection(weight_NK, None, a_RK.requires_grad_(), b_NR.requires_grad_(), SCALE)


if __name__ == "__main__":
    main(cases)
