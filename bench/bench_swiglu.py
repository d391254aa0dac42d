"""SwiGLU at the widths of SmolLM2 and Qwen2.5-32B. Run as `python -m bench.bench_swiglu`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case, forward_backward, main
from structcot_kernels import reference, swiglu


def cases(device: torch.device) -> Iterator[Case]:
    """Small shapes on a CPU, those of training on a GPU."""
    shapes = [(16384, 27648), (4096, 27648)] if device.type == "cuda" else [(2048, 1536), (128, 27648)]
    for num_rows, width in shapes:
        gate_TF, up_TF = (torch.randn(num_rows, width, device=device).bfloat16().requires_grad_() for _ in range(2))
        sides = {
            "structcot": forward_backward(swiglu, gate_TF, up_TF),
            "torch": forward_backward(reference.swiglu, gate_TF, up_TF),
        }
        if device.type == "cuda":
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

            own = (tensor.detach().clone().requires_grad_() for tensor in (gate_TF, up_TF))  # its backward writes gradients over them
            sides["liger"] = forward_backward(LigerSiLUMulFunction.apply, *own)
        yield Case(operation="swiglu", shape=f"T={num_rows} F={width} bfloat16", sides=sides)


if __name__ == "__main__":
    main(cases)
