"""The norm at the widths of SmolLM2 and Qwen2.5-32B. Run as `python -m bench.bench_rms_norm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import Case, forward_backward, main
from structcot_kernels import rms_norm

EPS = 1e-6


def cases(device: torch.device) -> Iterator[Case]:
    """Small shapes on a CPU, those of training on a GPU."""
    shapes = [(16384, 5120), (4096, 5120), (16384, 576)] if device.type == "cuda" else [(2048, 576), (256, 5120)]
    for num_rows, width in shapes:
        hidden_TD = torch.randn(num_rows, width, device=device).bfloat16().requires_grad_()
        weight_D = torch.ones(width, device=device, dtype=torch.bfloat16)
        sides = {
            "structcot": forward_backward(lambda x, w: rms_norm(x, w, EPS), hidden_TD, weight_D),
            "torch": forward_backward(lambda x, w, width=width: F.rms_norm(x, (width,), w, EPS), hidden_TD, weight_D),
        }
        if device.type == "cuda":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

            sides["liger"] = forward_backward(lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False), hidden_TD, weight_D)
        yield Case(operation="rms_norm", shape=f"T={num_rows} D={width} bfloat16", sides=sides)


if __name__ == "__main__":
    main(cases)
