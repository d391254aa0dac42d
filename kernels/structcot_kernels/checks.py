"""Checks of what comes in. A kernel reads whatever lies behind a pointer, so a wrong shape must never reach one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def can_be_read(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be looked at for nothing: they are there, and no GPU has to be waited for."""
    return tensor.is_cpu and not isinstance(tensor, FakeTensor)


def need_shape(operation: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuse a tensor of another shape; -1 fits every size.

    Raises:
        ValueError: naming the operation, the tensor and both shapes.
    """
    fits = tensor.ndim == len(shape) and all(want in (-1, size) for want, size in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{operation}: {name} has shape {tuple(tensor.shape)}; it must be ({wanted})")


def need_like(operation: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Refuse tensors that are not of the dtype and on the device of `like`, dtypes that no kernel knows, and sharded tensors.

    Raises:
        TypeError: if a tensor is a DTensor, or its dtype is another one.
        ValueError: if it lies on another device.
    """
    if like.dtype not in FLOATS:
        raise TypeError(f"{operation}: got {like.dtype}; use float32, bfloat16 or float16")
    if isinstance(like, DTensor):
        raise TypeError(f"{operation}: got a DTensor; kernels read local memory: gather it first (full_tensor)")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if isinstance(tensor, DTensor):
            raise TypeError(f"{operation}: {name} is a DTensor; kernels read local memory: gather it first (full_tensor)")
        if tensor.dtype != like.dtype:
            raise TypeError(f"{operation}: {name} is {tensor.dtype}; it must be {like.dtype}, as the input is")
        if tensor.device != like.device:
            raise ValueError(f"{operation}: {name} lies on {tensor.device}; it must lie on {like.device}, as the input does")


def need_rows(operation: str, **tensors: Tensor | None) -> None:
    """Refuse tensors whose last dimension has gaps: a kernel walks along it with stride 1.

    Raises:
        ValueError: naming the tensor and its strides.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{operation}: {name} has strides {tensor.stride()}; its last one must be 1: call contiguous() first")
