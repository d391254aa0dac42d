"""A count of what interpreted kernels load and store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@dataclass
class Traffic:
    """Bytes that unmasked lanes of kernels loaded and stored."""

    loaded: int = 0
    stored: int = 0


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count loads and stores of the kernels that run inside the block."""
    traffic = Traffic()
    plain_load, plain_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def load(self, ptrs, mask, *rest):
        traffic.loaded += int(np.count_nonzero(mask.data)) * width_bytes(ptrs)
        return plain_load(self, ptrs, mask, *rest)

    def store(self, ptrs, value, mask, *rest):
        traffic.stored += int(np.count_nonzero(mask.data)) * width_bytes(ptrs)
        return plain_store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = plain_load, plain_store


def width_bytes(ptrs: TensorHandle) -> int:
    return ptrs.get_element_ty().primitive_bitwidth // 8
