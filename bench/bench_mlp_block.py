"""The MLP block, forward and backward, against its plain expression. Run as `python -m bench.bench_mlp_block`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.bench_lora_linear import adapters_of, random_projection
from bench.harness import Case, forward_backward, main
from structcot_kernels import mlp_block, reference

EPS = 1e-6


def cases(device: torch.device) -> Iterator[Case]:
    """A layer of SmolLM2 on a CPU, of Qwen2.5-32B on a GPU, on two rungs of the ladder."""
    num_rows, hidden, inner, rank = (8192, 5120, 27648, 64) if device.type == "cuda" else (1024, 576, 1536, 16)
    for recompute in ("none", "block"):
        hidden_TD = torch.randn(num_rows, hidden, device=device).bfloat16().requires_grad_()
        norm_D = torch.ones(hidden, device=device, dtype=torch.bfloat16)
        gate, up, down = (random_projection(*shape, rank, device) for shape in ((inner, hidden), (inner, hidden), (hidden, inner)))

        def run(operation, recompute=recompute, norm_D=norm_D, group=(gate, up, down)):
            return lambda hidden, *_: operation(hidden, norm_D, *group, EPS, recompute=recompute)

        inputs = [hidden_TD, *adapters_of(gate, up, down)]
        yield Case(
            operation="mlp_block",
            shape=f"T={num_rows} D={hidden} F={inner} R={rank} recompute={recompute} bfloat16",
            sides={
                "structcot": forward_backward(run(mlp_block), *inputs),
                "torch": forward_backward(run(reference.mlp_block), *inputs),
            },
        )


if __name__ == "__main__":
    main(cases)
