"""The optimizer and its learning rate.

The schedule is a pure function of the step, so a resumed run needs nothing of it saved. Warm-up is linear; step 0 already uses
1 / warmup_steps of the peak. The decay ends at 0 after the last step.

AdamW works on what this process holds of each parameter, a shard or all of it, as every element goes its own way; only the names, shapes
and placements that a checkpoint sees are those of the whole. Its moments lie beside the parameters, in 8 bits if asked for, or in host
memory together with a copy of the parameters that the step is made on.

In 8 bits a block of elements shares a scale and each keeps the index of one of 256 values. Blocks lie inside rows, so that a checkpoint can
be laid out anew for another number of processes. Vectors, matrices under 4,096 elements and those whose rows no block divides stay in fp32.
Sources: Loshchilov and Hutter 2017 (arXiv 1608.03983, eq. 5, one cycle) and 2019 (arXiv 1711.05101, AdamW); Dettmers et al. 2021
(arXiv 2110.02861, 8 bits).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import TensorMeta

from structcot.config import TrainConfig
from structcot.errors import ConfigError
from structcot.model.parts import local_part, whole_on_cpu
from structcot.offload import SLAB_BYTES, HostMemory, Shelf, padded_bytes

BETAS = (0.9, 0.999)
EPSILON = 1e-8

MIN_8BIT_ELEMENTS = 4096
BLOCK_SIZES = (256, 128, 64)
"""Elements that share a scale: the first that divides a row."""


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of `num_steps`."""
    warmup_steps = math.ceil(round(config.warmup_ratio * num_steps, 6))  # 0.07 * 100 is a little more than 7
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * decay[config.lr_scheduler_type]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of at most `max_norm` over all parameters and ranks; the norm they had, () on the CPU."""
    parameters = list(parameters)
    norm = whole_on_cpu(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig, *, offload: bool = False) -> Optimizer:
    """AdamW over trained fp32 parameters by name, its state allocated at once. Matrices alone decay.

    With `offload` the state, a copy of the parameters and the step are the host's.

    Raises:
        ConfigError: if the optimizer cannot run here.
        TypeError: if a parameter is not fp32.
    """
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise TypeError(f"make_optimizer: {name} is {parameter.dtype}; what is trained must be torch.float32")
    if config.optimizer == "adamw-8bit":
        if offload:
            raise ConfigError(
                'train.optimizer: "adamw-8bit" keeps its state on the device, and parallel.cpu_offload = "optimizer" in host memory;'
                ' use "adamw" with the latter, or another parallel.cpu_offload'
            )
        return Optimizer(parameters, config, None, eight_bits=True)
    return Optimizer(parameters, config, HostCopies(parameters) if offload else None)


class Optimizer:
    """AdamW over `parameters`, on the device or on copies in host memory; make_optimizer makes it.

    Raises:
        ConfigError: if state in 8 bits is asked for and cannot be had here.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, copies: HostCopies | None, eight_bits: bool = False):
        self._parameters, self._copies = dict(parameters), copies
        self._worked = {name: worked_on(parameter) for name, parameter in parameters.items()} if copies is None else copies.masters
        decaying = [self._worked[name] for name, parameter in parameters.items() if parameter.dim() > 1]
        others = [self._worked[name] for name, parameter in parameters.items() if parameter.dim() <= 1]
        groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": BETAS, "eps": EPSILON}
        self._adamw = adamw_8bit(groups, options) if eight_bits else torch.optim.AdamW(groups, fused=True, **options)
        self._tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            worked, block = self._worked[name], block_size(parameter) if eight_bits else None
            if block is not None:
                state, tensors = eight_bit_state(parameter, block)
            else:
                state, tensors = full_state(parameter, worked, None if copies is None else copies.moments)
            self._adamw.state[worked] = state
            self._tensors |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at the learning rate `rate`. A parameter without a gradient stays as it is; a gradient that goes to the host is dropped.

        Raises:
            ConfigError: if the step in 8 bits cannot be compiled here.
        """
        for group in self._adamw.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        if self._copies is not None:
            self._copies.take_gradients(self._parameters)
        else:
            self._take_shards()
        try:
            self._adamw.step()
        except TorchDynamoException as error:
            raise ConfigError(
                f'train.optimizer: "adamw-8bit" compiles its step, and that failed here: {error}; mend the compiler (a GPU needs Triton,'
                ' a CPU a C++ compiler) or use "adamw"'
            ) from error
        if self._copies is not None:
            self._copies.hand_back(self._parameters)
        for name, parameter in self._parameters.items():
            if self._worked[name] is not parameter:
                self._worked[name].grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The live state by `NAME.KEY`; those of a sharded parameter are sharded as it is. Loading into them loads the run.

        What a step in host memory works on is not among them: it equals the parameters.
        """
        return dict(self._tensors)

    def loaded(self) -> None:
        """Take over parameters that were loaded from a checkpoint."""
        if self._copies is not None:
            self._copies.take_parameters(self._parameters)

    def _take_shards(self) -> None:
        """Work on each shard where it lies now: FSDP2 may give a parameter other memory in its first forward."""
        for name, parameter in self._parameters.items():
            if self._worked[name] is not parameter:
                self._worked[name].data = held(parameter)
                self._worked[name].grad = None if parameter.grad is None else held(parameter.grad)


class HostCopies:
    """Copies in host memory of what this process holds of `parameters`, and room for gradients and moments.

    What travels is pinned where the parameters lie on a GPU; the moments never do.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        parts = {name: held(parameter) for name, parameter in parameters.items()}
        self.device = next((part.device for part in parts.values()), torch.device("cpu"))
        num_bytes = 2 * sum(padded_bytes(part) for part in parts.values())
        shelf = Shelf(HostMemory(self.device, slab_bytes=min(SLAB_BYTES, num_bytes)))
        self.moments = Shelf(HostMemory(torch.device("cpu"), slab_bytes=num_bytes))
        self.masters = {name: nn.Parameter(shelf.empty_like(part)) for name, part in parts.items()}
        self.gradients = {name: shelf.empty_like(part) for name, part in parts.items()}
        self.take_parameters(parameters)

    @torch.no_grad()
    def take_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the parameters to the host."""
        for name, parameter in parameters.items():
            self.masters[name].copy_(held(parameter))

    def take_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move the gradients to the host, and wait for them; each is free on the device as soon as it is copied."""
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                self.masters[name].grad = self.gradients[name].copy_(held(parameter.grad), non_blocking=True)
                parameter.grad = None
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def hand_back(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the result to the parameters. Nobody waits: the next gradients come after it on the same stream."""
        for name, parameter in parameters.items():
            if self.masters[name].grad is not None:
                held(parameter).copy_(self.masters[name], non_blocking=True)


State = tuple[dict[str, Any], dict[str, Tensor]]
"""What AdamW keeps of a parameter, and the same memory as a checkpoint sees it."""


def full_state(parameter: nn.Parameter, worked: Tensor, shelf: Shelf | None) -> State:
    """State in fp32 where AdamW works, on `shelf` if given; its count of steps lies there, too, as one fused kernel wants it."""
    step = torch.zeros((), dtype=torch.float32, device=worked.device)
    make = torch.empty_like if shelf is None else shelf.empty_like
    moments = {key: make(worked.detach()).zero_() for key in ("exp_avg", "exp_avg_sq")}
    placed = {key: placed_as(parameter, moment, parameter.shape) for key, moment in moments.items()}
    return {"step": step, **moments}, {"step": step, **placed}


def eight_bit_state(parameter: nn.Parameter, block: int) -> State:
    """State in 8 bits: for each moment an index per element, a scale per block and the table of the 256 values."""
    make_zeros = import_module("torchao.optim.subclass_8bit").OptimState8bit.zeros
    local = held(parameter)
    num_rows, rows = parameter.shape[0], local.shape[0]
    state: dict[str, Any] = {"step": torch.zeros(())}
    tensors: dict[str, Tensor] = {"step": state["step"]}
    scales_shape = (num_rows, parameter.numel() // num_rows // block)
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        # a process may hold no row, of which the class for 8 bits cannot tell the size of a block
        moment = make_zeros((max(1, rows), *local.shape[1:]), signed, block, local.device, dtype=torch.float32)
        state[key] = moment if rows else torch.zeros_like(local)
        codes, scale = moment.codes[:rows], moment.scale.view(-1, scales_shape[1])[:rows]
        tensors[f"{key}.codes"] = placed_as(parameter, codes, parameter.shape)
        tensors[f"{key}.scale"] = placed_as(parameter, scale, scales_shape)
        tensors[f"{key}.qmap"] = moment.qmap
    return state, tensors


def block_size(parameter: nn.Parameter) -> int | None:
    """Elements that share a scale, or None where the state stays in fp32; the same on every process."""
    if parameter.dim() < 2 or parameter.numel() < MIN_8BIT_ELEMENTS:
        return None
    row = parameter.numel() // parameter.shape[0]
    return next((size for size in BLOCK_SIZES if row % size == 0), None)


def adamw_8bit(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of torchao.

    Raises:
        ConfigError: if torchao is not installed, or the parameters lie neither on a GPU nor on a CPU.
    """
    try:
        torchao_optim = import_module("torchao.optim")
    except ImportError as error:
        raise ConfigError(
            f'train.optimizer: "adamw-8bit" needs the package torchao, which cannot be imported: {error};'
            ' pip install "structcot[cuda]", or use "adamw"'
        ) from error
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    if not kinds <= {"cuda", "cpu"}:
        raise ConfigError(
            f'train.optimizer: "adamw-8bit" runs on CUDA and CPU, and parameters lie on {", ".join(sorted(kinds))}; use "adamw"'
        )
    return torchao_optim.AdamW8bit(groups, **options)


# What a process holds of a parameter


@torch.no_grad()
def held(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory and without a graph."""
    return local_part(tensor).detach()


def worked_on(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself, or its shard in the same memory."""
    return nn.Parameter(held(parameter)) if isinstance(parameter, DTensor) else parameter


def placed_as(parameter: nn.Parameter, local: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`local` as this process's part of a tensor of `shape` whose rows lie as those of `parameter`; on the host, too.

    DTensor.from_local would move it to the devices of the mesh.
    """
    if not isinstance(parameter, DTensor):
        return local
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    spec = replace(parameter._spec, tensor_meta=TensorMeta(torch.Size(shape), stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)  # type: ignore[call-arg]
