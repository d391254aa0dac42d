"""What a run of benchmarks prints and writes: the table, and the JSON that `python -m bench` and `pytest bench` both end in."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from structcot_kernels.attention_varlen import installed_version

OURS = "structcot"
"""The side that the others are compared with."""
PACKAGES = ("torch", "triton", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4")
TIMERS = {"cuda": "CUDA events", "cpu": "wall clock"}
RESULTS_DIR = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One timed case: operations and bytes of our side, and for each side its times, or None where memory did not suffice."""

    operation: str
    shape: str
    flops: float
    bytes: float
    milliseconds: dict[str, dict[str, float] | None]


def milliseconds_of(seconds: Sequence[float]) -> dict[str, float]:
    """Median and least of some times."""
    return {"median": 1e3 * statistics.median(seconds), "min": 1e3 * min(seconds)}


HEADER = f"{'operation':20} {'shape':72} {'side':24} {'median ms':>10} {'min ms':>10} {'x ours':>7} {'TFLOP/s':>8} {'GB/s':>7}"


def rows_of(result: Result) -> str:
    """A line for each side; rates are those of our median."""
    ours = result.milliseconds[OURS]
    lines = []
    for name, times in result.milliseconds.items():
        line = f"{result.operation:20} {result.shape:72} {name:24} "
        if times is None or ours is None:
            lines.append(f"{line}out of memory")
            continue
        line += f"{times['median']:10.3f} {times['min']:10.3f} {times['median'] / ours['median']:7.2f}"
        if name == OURS:
            line += f" {result.flops / times['median'] / 1e9:8.2f} {result.bytes / times['median'] / 1e6:7.1f}"
        lines.append(line)
    return "\n".join(lines)


def report(device: torch.device, results: Sequence[Result], blocked: dict[str, str]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "device": device_name(device),
        "timer": TIMERS[device.type],
        "versions": {package: str(version) for package in PACKAGES if (version := installed_version(package))},
        "blocked": blocked,
        "cases": [asdict(result) for result in results],
    }


def device_name(device: torch.device) -> str:
    """Of the GPU; or the kind of processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def results_path(device: torch.device) -> Path:
    """Where a whole run on a GPU is kept."""
    return RESULTS_DIR / f"kernels_{re.sub(r'[^a-z0-9]+', '_', device_name(device).lower())}.json"
