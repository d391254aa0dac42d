"""Floating-point operations of a training step, by formula, and what the device could do.

Model FLOPs (`perf/mfu_4n`): what the mathematics asks for. A frozen weight costs 2 forward and 2 for the gradient of its input, so LoRA
needs 4 N + 6 N_adapter a token, full fine-tuning 6 N, with N the matmul weights of body and head; causal attention over a document of L
tokens needs 2 L^2 heads head_dim a layer forward and twice that backward. Recomputation does not count.
Hardware FLOPs (`perf/hfu`): what is really executed. The head sees supervised rows alone, attention's backward makes its scores again
(2.5 times the forward), and where blocks recompute, q, k, v, gate and up are made twice, with `full` also attention.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from structcot.config import TuningConfig
from structcot.model.spec import ModelSpec

# Dense bf16 peak in FLOP/s, from the makers' data sheets.
DATASHEET_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}

REPLAYED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Projections that a block runs again in its backward; their adapters' inputs after A are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """Floating-point operations of one step."""

    model: float
    hardware: float


def step_flops(spec: ModelSpec, lengths_S: Sequence[int], num_supervised: int, tuning: TuningConfig, recompute: str) -> StepFlops:
    """Count a step over documents of `lengths_S` tokens, trained as `tuning` says; `recompute` is "none", "block" or "full"."""
    num_tokens, lora = sum(lengths_S), tuning.method == "lora"
    attention = spec.num_layers * 2.0 * spec.num_heads * spec.head_dim * sum(float(length) ** 2 for length in lengths_S)
    adapted = tuning.target_modules if lora else ()
    adapter_parameters = spec.num_layers * sum(tuning.lora_r * sum(spec.projection_shapes[name]) for name in adapted)
    per_weight = 4.0 if lora else 6.0
    adapters = 6.0 * adapter_parameters * num_tokens
    body = per_weight * spec.body_matmul_parameters * num_tokens
    replay = 0.0
    if recompute != "none":
        weights = sum(outputs * inputs for outputs, inputs in (spec.projection_shapes[name] for name in REPLAYED))
        low_rank = sum(tuning.lora_r * spec.projection_shapes[name][0] for name in REPLAYED if name in adapted)
        replay = 2.0 * spec.num_layers * (weights + low_rank) * num_tokens + (attention if recompute == "full" else 0.0)
    return StepFlops(
        model=body + per_weight * spec.head_matmul_parameters * num_tokens + adapters + 3.0 * attention,
        hardware=body + per_weight * spec.head_matmul_parameters * num_supervised + adapters + 3.5 * attention + replay,
    )


def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The device's dense matmul rate: the data sheet's for a GPU it names, else the best of five products measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in DATASHEET_PEAKS.items():
            if part in name:
                return peak
    size = 1536
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best_seconds = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return 2.0 * size**3 / best_seconds
