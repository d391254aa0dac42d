"""Which code runs an operation: Triton on a GPU, PyTorch on a CPU, or what the caller chose. Nothing falls back silently.

Under `TRITON_INTERPRET=1`, set before this package is imported, the same Triton code runs on a CPU, one program after the other.
"""

from __future__ import annotations

import os

from torch import Tensor

BACKENDS = ("auto", "triton", "torch")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels of this process are interpreted. Triton reads the variable when a kernel is defined, so it cannot change later."""

_backend = "auto"


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
    if tensor.is_cuda or INTERPRETED:
        return True
    if _backend == "triton":
        raise RuntimeError(
            f"structcot_kernels: the backend is triton and the tensor lies on {tensor.device};"
            " move it to a GPU, or set TRITON_INTERPRET=1 before Python starts"
        )
    return False


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size` (1 for 0), which is what the extent of a Triton block must be."""
    return 1 << max(0, size - 1).bit_length()
