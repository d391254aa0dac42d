"""What a piece of PyTorch code asks of a GPU: each kernel that it would launch, with floating-point operations and bytes of device memory.

Run the code on tensors without memory (device `meta`, or fake ones) inside `Tally`. An operator that has a cost formula
(structcot_kernels._cost) costs what that says, and an operator of our own without one is an error. For the rest, products are counted by
torch.utils.flop_counter and everything else as one operation for each element written; bytes are those of every operand read once and every
result written once. Views move nothing. What PyTorch's CUDA code is known to do otherwise stands in the tables below.

FSDP2's operators are copies of what this rank reads and writes. Collectives are no kernels; they are noted apart. Of a tensor that is
sharded over ranks the part of this rank counts; what an operator on such tensors sends by itself (a sum of norms) is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from structcot_kernels._cost import COSTS, Cost

# Operators that only claim memory, by the beginning of their names.
ALLOCATING = ("empty", "new_empty")
# Operands of which only the shape matters, or so few elements that they do not count.
UNREAD = {
    "zeros_like": "self",
    "ones_like": "self",
    "full_like": "self",
    "new_zeros": "self",
    "new_ones": "self",
    "new_full": "self",
    "nll_loss_forward": "self",
    "nll_loss_backward": "self",
}
# Operands of which as many bytes are read as the result has.
PICKED = {"embedding": "weight", "index": "self", "index_select": "self", "gather": "self"}
# In-place operators that do not read what they overwrite.
OVERWRITING = ("copy_", "fill_", "zero_")
# Namespaces of operators that ask or note something and launch nothing.
LAUNCHING_NOTHING = ("prim", "profiler")
# Kind of a collective by its operator, and the argument whose bytes count; without one those of the result do.
COLLECTIVES = {
    "_allgather_base_": ("all-gather", "output_tensor"),
    "_reduce_scatter_base_": ("reduce-scatter", "input_tensor"),
    "allreduce_": ("all-reduce", "tensors"),
    "alltoall_base_": ("all-to-all", "output"),
    "all_gather_into_tensor": ("all-gather", None),
    "reduce_scatter_tensor": ("reduce-scatter", "input"),
    "all_reduce": ("all-reduce", "input"),
    "all_to_all_single": ("all-to-all", None),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launched kernel: the operator that launched it, the kind of work, and the cost."""

    operator: str
    kind: str
    cost: Cost


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective: what it does, the ranks that meet in it, and the bytes on one of them of its larger side.

    That is what an all-gather and an all-to-all make, what a reduce-scatter takes, and what an all-reduce works on.
    """

    kind: str
    bytes: int
    group_size: int


KindOf = Callable[[OpOverload, Sequence[Tensor], nn.Module | None], str]
"""Names the kind of work of an operator, from its tensors and the innermost module whose forward runs it or ran what it differentiates."""


class Tally(TorchDispatchMode):
    """Notes in `kernels` what runs inside it, forward and backward, and in `collectives` where ranks meet, both in order.

    What it runs must not leave Python: use tensors on device `meta` or under FakeTensorMode, with a process group that is "fake", too.
    """

    def __init__(self, kind_of: KindOf):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.collectives: list[Collective] = []
        self._kind_of = kind_of
        self._running: list[nn.Module] = []
        self._module_of_node: dict[int, nn.Module] = {}

    def __enter__(self) -> Tally:
        self._hooks = (
            register_module_forward_pre_hook(lambda module, _: self._running.append(module)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace in LAUNCHING_NOTHING:
            return result
        held_args, held_kwargs, held = (args, kwargs, result) if DTensor not in types else parts_of((args, kwargs, result))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives += collectives_of(func, held_args, held_kwargs, held)
            return result
        costs = costs_of(func, held_args, held_kwargs, held)
        if costs:
            operands = [leaf for leaf in tree_leaves((held_args, held_kwargs, held)) if isinstance(leaf, Tensor)]
            kind = self._kind_of(func, operands, self._module())
            self.kernels += [Kernel(str(func), kind, cost) for cost in costs]
        return result

    def _leave(self) -> None:
        self._running.pop()

    def _module(self) -> nn.Module | None:
        """The module at work. An operator's node in the graph has the number that was given out last when it ran."""
        if self._running:
            self._module_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, self._running[-1])  # type: ignore[attr-defined]
            return self._running[-1]
        node = torch._C._current_autograd_node()
        return None if node is None else self._module_of_node.get(node._sequence_nr())


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Adds up in `total` the memory that autograd keeps for the backward of what runs inside it, the parameters of `model` left out.

    A tensor keeps all of its storage alive, and a storage counts once. A checkpointed region counts with its inputs, as it keeps no more.
    """

    def __init__(self, model: nn.Module):
        known = {storage_of(parameter) for parameter in model.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if storage_of(tensor) not in known:
                kept.setdefault(storage_of(tensor), tensor)
            return tensor

        super().__init__(keep, lambda tensor: tensor)
        self._kept = kept

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def costs_of(operator: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> list[Cost]:
    """The kernels of one operator that gave `result`; none for a view.

    Raises:
        ValueError: if the operator is not PyTorch's own and has no cost formula.
    """
    if operator in COSTS:
        return COSTS[operator](*args, **kwargs)
    if operator.namespace not in ("aten", "prims", "fsdp"):
        raise ValueError(f"{operator}: has no cost formula; give it one by structcot_kernels._cost.register_cost")
    name = operator._opname
    reads, written = operands_of(operator, args, kwargs)
    if name == "all_gather_copy_in":  # into this rank's part of the buffer, which its schema takes for an operand
        reads.pop("all_gather_output")
        return [Cost(0.0, 2 * stored_bytes(reads.values()))]
    known = {storage_of(tensor) for tensor in (*reads.values(), *written)}
    written += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and storage_of(leaf) not in known]
    if not written or name.startswith(ALLOCATING):
        return []
    reads.pop(UNREAD.get(name, ""), None)
    picked = reads.pop(PICKED.get(name, ""), None)
    written_bytes = stored_bytes(written)
    moved = stored_bytes(reads.values()) + written_bytes * (1 if picked is None else 2)
    if not is_product(operator):
        return [Cost(float(sum(tensor.numel() for tensor in written)), moved)]
    flops = float(flop_registry[out_of_place(operator)](*args, **kwargs, out_val=result))
    if "self" not in reads or not copies_addend(name, reads["self"], written[0]):
        return [Cost(flops, moved)]
    addend_bytes = stored_bytes([reads["self"]])
    return [Cost(0.0, addend_bytes + written_bytes), Cost(flops, moved - addend_bytes + written_bytes)]


def collectives_of(operator: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> list[Collective]:
    """The collective that an operator of c10d runs; none where it only waits.

    Raises:
        ValueError: if it is none that COLLECTIVES knows.
    """
    if operator._opname == "wait_tensor":
        return []
    if operator._opname not in COLLECTIVES:
        raise ValueError(f"{operator}: is no collective that is known here; add it to structcot.counting.COLLECTIVES")
    kind, counted = COLLECTIVES[operator._opname]
    values = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    tensors = [leaf for leaf in tree_leaves(result if counted is None else values[counted]) if isinstance(leaf, Tensor)]
    return [Collective(kind, stored_bytes(tensors), ranks_of(values.get("process_group", values.get("group_name"))))]


def ranks_of(group: Any) -> int:
    """Ranks of a process group, which operators are given by name or boxed."""
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]
    return (group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)).size()


def parts_of(tree: Any) -> Any:
    """The same with this rank's part in place of every tensor that is sharded."""
    return tree_map_only(DTensor, lambda tensor: tensor._local_tensor, tree)


def is_product(operator: OpOverload) -> bool:
    """Whether torch.utils.flop_counter knows the operator, which holds for matrix products, convolutions and attention."""
    return out_of_place(operator) in flop_registry


def out_of_place(operator: OpOverload) -> OpOverloadPacket | None:
    """The operator's overloads, those of `mm` for `mm_`."""
    return getattr(torch.ops.aten, operator._opname.rstrip("_"), None)


def copies_addend(name: str, addend: Tensor, out: Tensor) -> bool:
    """Whether a product first copies what it adds to into its result, as PyTorch does but for a bias (N,) and a result without gaps."""
    if name not in ("addmm", "baddbmm") or storage_of(addend) == storage_of(out):
        return False
    return name == "baddbmm" or addend.ndim != 1 or not out.is_contiguous()


def operands_of(operator: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Tensors that are read, by name of the argument (elements of a list are numbered), and tensors that are written into."""
    reads: dict[str, Tensor] = {}
    written: list[Tensor] = []
    for index, argument in enumerate(operator._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += tensors
        if not (argument.is_out or (is_written and operator._opname in OVERWRITING)):
            names = (argument.name, *(f"{argument.name}[{number}]" for number in range(1, len(tensors))))
            reads.update(zip(names, tensors, strict=False))
    return reads, written


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that `tensors` occupy: the same one counts once, and so does what a dimension of stride 0 repeats."""
    sizes = {}
    for tensor in tensors:
        extents = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        place = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        sizes[place] = math.prod(extents) * tensor.element_size()
    return sum(sizes.values())


def storage_of(tensor: Tensor) -> int:
    """What tells one tensor's memory from another's as long as both are alive."""
    return tensor.untyped_storage()._cdata
