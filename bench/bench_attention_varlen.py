"""Attention over packed documents, ours beside the libraries called directly. Run as `python -m bench.bench_attention_varlen`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bench.harness import Case, forward_backward, main
from structcot_kernels import attention_varlen, reference
from structcot_kernels.attention_varlen import LIBRARIES, choose_attention, find_obstacle

Attend = Callable[..., Tensor | tuple[Tensor, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    """Heads of SmolLM2 on a CPU, of Qwen2.5-32B on a GPU: long documents, and many short ones."""
    if device.type == "cuda":
        layouts, num_heads, num_groups, width = [(4, 4096), (1, 16384), (64, 256)], 40, 8, 128
    else:
        layouts, num_heads, num_groups, width = [(5, 400), (1, 1024), (50, 40)], 9, 3, 64
    for num_documents, length in layouts:
        shapes = [(num_documents * length, count, width) for count in (num_heads, num_groups, num_groups)]
        heads = [torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes]
        borders = torch.arange(0, num_documents * length + 1, length, device=device, dtype=torch.int32)
        attends = functions(borders, length, width, device)
        yield Case(
            operation="attention_varlen",
            shape=f"T={num_documents}x{length} H={num_heads} G={num_groups} d={width} bfloat16",
            sides={name: forward_backward(attend, *heads) for name, attend in attends.items()},
        )


def functions(borders: Tensor, length: int, width: int, device: torch.device) -> dict[str, Attend]:
    """Ours as it chooses, PyTorch document by document, and on a GPU every other library that runs there and torch's public function."""
    scale = width**-0.5
    layout = {"cu_seqlens_S1": borders, "max_seqlen": length, "scale": scale}
    sides: dict[str, Attend] = {"structcot": partial(attention_varlen, **layout), "torch": partial(reference.attention_varlen, **layout)}
    if device.type == "cuda":
        chosen = choose_attention("auto", device, torch.bfloat16, width)
        usable = [name for name in LIBRARIES if not find_obstacle(name, device, torch.bfloat16, width)]
        sides |= {name: partial(attention_varlen, implementation=name, **layout) for name in usable if name != chosen}
        lengths = {"cu_seq_q": borders, "cu_seq_k": borders, "max_q": length, "max_k": length}
        grouped = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}
        sides["torch varlen_attn"] = partial(varlen_attn, scale=scale, window_size=(-1, 0), **lengths, **grouped)
    return sides


if __name__ == "__main__":
    main(cases)
