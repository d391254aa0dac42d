"""Which code runs an operation: Triton on a GPU, PyTorch on a CPU, or what the caller chose; and the one place that starts a kernel.

Nothing falls back silently. Under `TRITON_INTERPRET=1`, set before this package is imported, the same Triton code runs on a CPU, one
program after the other.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels of this process are interpreted. Triton reads the variable when a kernel is defined, so it cannot change later."""

if INTERPRETED:
    from structcot_kernels._interpreter import make_bfloat16_right

    make_bfloat16_right()


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a kernel: its positional arguments and, in `meta`, its constants (upper case) and compile options (num_warps ...)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


HOPPER = 90
"""Compute capability 9.0."""

MIN_PROGRAMS = 264
"""Programs that fill a GPU: two for each of an H100's 132 multiprocessors."""

_backend = "auto"
_recorded: list[Launch] | deque[Launch] | None = None
_recorded_arch = HOPPER


def use_backend(name: str) -> None:
    """Choose what runs every operation of this process from now on: `triton`, `torch`, or `auto` for Triton wherever it can run.

    Raises:
        ValueError: if `name` is none of them.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"use_backend: got {name!r}; use one of {', '.join(BACKENDS)}")
    _backend = name


def backend() -> str:
    """What was chosen."""
    return _backend


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs the Triton kernels.

    Raises:
        RuntimeError: if Triton was chosen for a tensor on a CPU and the kernels are not interpreted.
    """
    if _backend == "torch":
        return False
    if tensor.is_cuda or tensor.is_meta or INTERPRETED or _recorded is not None:
        return True
    if _backend == "triton":
        raise RuntimeError(
            f"structcot_kernels: the backend is triton and the tensor lies on {tensor.device};"
            " move it to a GPU, or set TRITON_INTERPRET=1 before Python starts"
        )
    return False


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Start `kernel` on `grid`; an empty grid is nothing to do."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
    elif all(grid):
        kernel[grid](*args, **meta, enable_fp_fusion=True)  # said, since Triton's own default is about to change


@contextmanager
def recorded_launches(arch: int = HOPPER) -> Iterator[list[Launch]]:
    """Note kernels instead of starting them, so that the code of an operation can run on tensors without memory (meta or fake ones).

    `arch` is the compute capability that the launches are to be made for, 90 for 9.0.
    """
    launches: list[Launch] = []
    with _launches_to(launches, arch):
        yield launches


@contextmanager
def skipped_launches(arch: int = HOPPER) -> Iterator[None]:
    """Neither start nor note kernels: what they work on is let go as it would be."""
    with _launches_to(deque(maxlen=0), arch):
        yield


@contextmanager
def _launches_to(launches: list[Launch] | deque[Launch], arch: int) -> Iterator[None]:
    global _recorded, _recorded_arch
    outer, _recorded, _recorded_arch = (_recorded, _recorded_arch), launches, arch
    try:
        yield
    finally:
        _recorded, _recorded_arch = outer


def arch_of(tensor: Tensor) -> int:
    """Compute capability of the GPU that `tensor` lies on, 90 for 9.0; where there is none, that which is recorded for."""
    if not tensor.is_cuda:
        return _recorded_arch
    return _capability(tensor.device)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def chunks_for(num_blocks: int, side_by_side: int) -> tuple[int, int]:
    """Chunks that a sum over `num_blocks` blocks is cut into, and the blocks of each, where `side_by_side` programs make a chunk.

    There are enough of them to fill a GPU, one at least, and none is empty.
    """
    num_blocks = max(1, num_blocks)
    blocks_at_once = cdiv(num_blocks, min(num_blocks, cdiv(MIN_PROGRAMS, max(1, side_by_side))))
    return cdiv(num_blocks, blocks_at_once), blocks_at_once


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size` (1 for 0), which is what the extent of a Triton block must be."""
    return 1 << max(0, size - 1).bit_length()
