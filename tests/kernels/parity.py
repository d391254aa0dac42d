"""Is a kernel as exact as PyTorch? Both are held against the same computation in fp64.

The error of a kernel may be twice that of PyTorch in the same dtype, plus a floor that the rounding of one result explains; both as a
relative Frobenius norm and as the largest error over the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOORS = {torch.float32: 5e-7, torch.bfloat16: 1e-3, torch.float16: 1.25e-4}

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_parity(ours: Function, reference: Function, tensors: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
    """Check outputs and the gradients of every input that requires one, for the same random gradients of the outputs.

    `ours` and `reference` take `tensors` in order (those that are no floats stay as they are in the fp64 computation) and return one or
    more tensors.
    """
    exact = run(reference, [widened(tensor) for tensor in tensors])
    torch_results = run(reference, tensors)
    our_results = run(ours, tensors)
    assert len(our_results) == len(torch_results) == len(exact)
    dtype = next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
    for index, (our, other, truth) in enumerate(zip(our_results, torch_results, exact, strict=True)):
        label = names[index] if names else f"result {index}"
        assert our.shape == truth.shape, f"{label}: shape {tuple(our.shape)}, not {tuple(truth.shape)}"
        assert_as_exact(our, other, truth, FLOORS[dtype], label)


def assert_as_exact(ours: Tensor, other: Tensor, truth: Tensor, floor: float, label: str) -> None:
    """Error of `ours` against `truth` at most twice that of `other`, plus `floor`."""
    assert ours.isfinite().all(), f"{label}: not finite"
    for measure in (frobenius_error, largest_error):
        error, allowed = measure(ours, truth), 2.0 * measure(other, truth) + floor
        assert error <= allowed, f"{label}: {measure.__name__} {error:.3e}, allowed {allowed:.3e}"


def assert_compile_sees_it_whole(function: Function, tensors: Sequence[Tensor]) -> None:
    """Check that torch.compile traces `function(*tensors)` and its backward without a break, to the same values."""
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    wanted, got = function(*tensors), torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(got, wanted)
    for one, other in zip(*(torch.autograd.grad(out.sum(), trained) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def frobenius_error(values: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return relative(lambda tensor: tensor.norm(), values, truth)


def largest_error(values: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value."""
    return relative(lambda tensor: tensor.abs().amax() if tensor.numel() else tensor.sum(), values, truth)


def relative(size: Callable[[Tensor], Tensor], values: Tensor, truth: Tensor) -> float:
    difference, whole = float(size(values.double().cpu() - truth.double().cpu())), float(size(truth.double().cpu()))
    return difference / whole if whole else difference


def widened(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def run(function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of every tensor that requires one."""
    for tensor in tensors:
        tensor.grad = None
    outputs = function(*tensors)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    differentiable = [output for output in outputs if output.requires_grad]
    gradients: Sequence[Tensor] = ()
    if trained:
        gradients = torch.autograd.grad(differentiable, trained, [seed_gradient(output) for output in differentiable])
    return [*(output.detach() for output in outputs), *(gradient.detach() for gradient in gradients)]


def seed_gradient(output: Tensor) -> Tensor:
    """The same numbers for every dtype, rounded to bf16 so that all of them hold them exactly."""
    generator = torch.Generator().manual_seed(output.numel())
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return values.bfloat16().to(output.dtype).to(output.device)


def random(
    *shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0, trained: bool = True, device: torch.device | str = "cpu"
) -> Tensor:
    """Normal numbers of `dtype`."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return values.to(device).requires_grad_(trained)
