"""The attention block, forward and backward, against its plain expression. Run as `python -m bench.bench_attention_block`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.bench_lora_linear import adapters_of, random_projection
from bench.bench_mlp_block import EPS
from bench.harness import Case, forward_backward, main
from structcot_kernels import attention_block, reference


def cases(device: torch.device) -> Iterator[Case]:
    """A layer of SmolLM2 on a CPU, of Qwen2.5-32B on a GPU, on two rungs of the ladder."""
    if device.type == "cuda":
        num_documents, length, hidden, heads, groups, width, rank = 2, 4096, 5120, 40, 8, 128, 64
    else:
        num_documents, length, hidden, heads, groups, width, rank = 4, 256, 576, 9, 3, 64, 16
    num_rows = num_documents * length
    positions_T = torch.arange(length, device=device).repeat(num_documents)
    cos_Pd, sin_Pd = tables(length, width, device)
    borders = torch.arange(0, num_rows + 1, length, device=device, dtype=torch.int32)
    for recompute in ("none", "block"):
        hidden_TD = torch.randn(num_rows, hidden, device=device).bfloat16().requires_grad_()
        norm_D = torch.ones(hidden, device=device, dtype=torch.bfloat16)
        shapes = ((heads * width, hidden), (groups * width, hidden), (groups * width, hidden), (hidden, heads * width))
        group = [random_projection(*shape, rank, device) for shape in shapes]

        def run(operation, recompute=recompute, norm_D=norm_D, group=group):
            layout = (positions_T, cos_Pd, sin_Pd, borders, length, EPS)
            return lambda hidden, *_: operation(hidden, norm_D, *group, *layout, recompute=recompute)

        inputs = [hidden_TD, *adapters_of(*group)]
        yield Case(
            operation="attention_block",
            shape=f"T={num_documents}x{length} D={hidden} H={heads} G={groups} d={width} R={rank} recompute={recompute} bfloat16",
            sides={
                "structcot": forward_backward(run(attention_block), *inputs),
                "torch": forward_backward(run(reference.attention_block), *inputs),
            },
        )


def tables(num_positions: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (P, d), fp32, of the plain rotary embedding with base 1e6."""
    frequencies = 1e6 ** -(torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(num_positions, device=device)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=1)
    return angles.cos(), angles.sin()


if __name__ == "__main__":
    main(cases)
