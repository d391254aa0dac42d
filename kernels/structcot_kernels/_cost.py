"""What an operation costs, by formula: floating-point operations and bytes of device memory of each kernel that it launches.

A product of (M, K) and (K, N) is 2 M N K operations. `bytes` are those that must move through device memory: every input read once and
every output written once, plus what a kernel reads again after too much else to find it in a cache. What programs that run side by side
read a second time (a weight that every row needs, a tile that the neighbours share) comes from the cache and stands in `cached_bytes`;
the sum of both is what an interpreted kernel is seen to load and store. The formulas are registered beside the operations; torch's
FlopCounterMode sees them, and a dispatch mode can look up all numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils.flop_counter import flop_registry, register_flop_formula


@dataclass(frozen=True, slots=True)
class Cost:
    """One launched kernel: floating-point operations, bytes through device memory, and bytes read again from a cache."""

    flops: float
    bytes: float
    cached_bytes: float = 0.0


flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])  # torch counts addmm and forgets the one in place

COSTS: dict[Any, Callable[..., list[Cost]]] = {}
"""Cost formula of each registered operator, called with the operator's own arguments, which may be fake tensors."""


def register_cost(operator: CustomOpDef) -> Callable[[Callable[..., list[Cost]]], Callable[..., list[Cost]]]:
    """Make the decorated function the cost formula of `operator`: it takes the same arguments and returns one `Cost` for each kernel."""

    def register(formula: Callable[..., list[Cost]]) -> Callable[..., list[Cost]]:
        def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return int(sum(cost.flops for cost in formula(*args, **kwargs)))

        COSTS[operator._opoverload] = formula
        register_flop_formula(operator._opoverload.overloadpacket, get_raw=True)(flops)
        return formula

    return register


def size_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements of `tensors`; a missing one has none."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def matmul_cost(num_rows: int, num_columns: int, inner: int, width: int) -> Cost:
    """A library product (M, K) x (K, N) of elements `width` bytes wide."""
    moved = num_rows * inner + inner * num_columns + num_rows * num_columns
    return Cost(2.0 * num_rows * num_columns * inner, float(width * moved))


def roofline_seconds(costs: list[Cost], flops_per_second: float, bytes_per_second: float) -> float:
    """Least time of kernels run one after the other, each bound by arithmetic or by memory (Williams et al. 2009)."""
    return math.fsum(max(cost.flops / flops_per_second, cost.bytes / bytes_per_second) for cost in costs)
