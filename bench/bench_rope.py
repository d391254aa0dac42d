"""Rotary positions at the heads of SmolLM2 and Qwen2.5-32B. Run as `python -m bench.bench_rope`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.bench_attention_block import tables
from bench.harness import Case, Side, forward_backward, main
from structcot_kernels import reference, rope


def cases(device: torch.device) -> Iterator[Case]:
    """Small shapes on a CPU, those of training on a GPU."""
    shapes = [(16384, 40, 128), (16384, 8, 128)] if device.type == "cuda" else [(2048, 9, 64), (512, 40, 128)]
    for num_tokens, num_heads, width in shapes:
        heads_THd = torch.randn(num_tokens, num_heads, width, device=device).bfloat16().requires_grad_()
        place = (torch.arange(num_tokens, device=device), *tables(num_tokens, width, device))
        sides = {
            "structcot": forward_backward(lambda heads, place=place: rope(heads, *place), heads_THd),
            "torch": forward_backward(lambda heads, place=place: reference.rope(heads, *place), heads_THd),
        }
        if device.type == "cuda":
            sides["liger"] = liger(heads_THd, *place[1:])
        yield Case(operation="rope", shape=f"T={num_tokens} H={num_heads} d={width} bfloat16", sides=sides)


def liger(heads_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Side:
    """Liger turns queries and keys at once, where they lie, by rows already gathered: half of the heads each, copied once."""
    from liger_kernel.ops.rope import LigerRopeFunction  # pyright: ignore[reportMissingImports]

    halves = (half.contiguous()[None].transpose(1, 2).requires_grad_() for half in heads_THd.detach().chunk(2, dim=1))
    return forward_backward(LigerRopeFunction.apply, *halves, cos_Td, sin_Td)


if __name__ == "__main__":
    main(cases)
