"""What a microbenchmark is: one shape of one operation, ours beside what users would write without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape. `sides` maps a name to something that runs forward and backward once; the first is ours, `structcot`."""

    operation: str
    shape: str
    sides: dict[str, Callable[[], object]]


def forward_backward(function: Callable[..., Tensor | tuple[Tensor, ...]], *tensors: Tensor) -> Callable[[], object]:
    """Run `function(*tensors)` and its backward to every tensor that requires a gradient; the gradients of the outputs are made once."""
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    seeds: list[Tensor] = []

    def run() -> Sequence[Tensor]:
        outputs = function(*tensors)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        differentiable = [output for output in outputs if output.requires_grad]
        if not seeds:
            seeds.extend(torch.randn_like(output) for output in differentiable)
        return torch.autograd.grad(differentiable, trained, seeds)

    return run
