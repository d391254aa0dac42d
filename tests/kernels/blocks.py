"""What the tests of both blocks share: small blocks of random weights, and a count of the operators that run."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.parity import random

T, D = 37, 48
LENGTHS = (1, 20, 16)
EPS = 1e-5


def projection_tensors(
    num_outputs: int, num_inputs: int, rank: int, dtype: torch.dtype, device, *, seed: int, trained: bool, bias: bool = True
) -> list[Tensor | None]:
    """Weight, bias, A and B; rank 0 has no adapter."""
    weight_NK = random(num_outputs, num_inputs, dtype=dtype, seed=seed, scale=num_inputs**-0.5, trained=trained, device=device)
    bias_N = random(num_outputs, dtype=dtype, seed=seed, scale=0.3, trained=trained, device=device) if bias else None
    if not rank:
        return [weight_NK, bias_N, None, None]
    lora_a_RK = random(rank, num_inputs, dtype=dtype, seed=seed, scale=num_inputs**-0.5, device=device)
    lora_b_NR = random(num_outputs, rank, dtype=dtype, seed=seed + 1, scale=0.3, device=device)
    return [weight_NK, bias_N, lora_a_RK, lora_b_NR]


def keys(device) -> Tensor:
    """A key for each token."""
    return torch.randint(0, 2**62, (T,), generator=torch.Generator().manual_seed(0)).to(device)


class CountOperators(TorchDispatchMode):
    """How often each operator ran while it was on, by name; products also by (name, inner size, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.products: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.calls[name] += 1
        if name.startswith(("aten.mm.", "aten.addmm")):
            left, right = args[-2:]
            self.products[(left.shape[1], right.shape[1])] += 1
        return function(*args, **(kwargs or {}))


def kept_bytes(run) -> int:
    """Bytes of the storages that `run()` keeps for its backward, parameters and other inputs counted with them."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storages.values())
