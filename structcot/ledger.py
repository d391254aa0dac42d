"""A ledger of device memory: what is alive at every moment, how much that is at most, and of what kinds it is then.

It watches every operator of the code that runs inside it, on real tensors or on fake ones (torch's FakeTensorMode), so a step can be
weighed that no memory here would hold. A storage counts from the operator that makes it to the end of its last reference; FSDP2 frees and
refills storages in place, which is followed. What a storage is for often shows after it was made, so one that was alive at the peak counts
there as the kind that it got last. Of a sharded tensor the part of this rank counts.

An operator of our own is run by its real body, whose buffers count; on fake tensors Triton kernels must not be started then
(structcot_kernels.launch.skipped_launches). What no dispatch mode can see is added by formula: the buffers of attention, which is a
library's, and on a CPU the copies that PyTorch makes of operands of another dtype. What an operator on sharded tensors holds inside is not
seen, only what it gives; training has none that makes more than a few numbers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from structcot_kernels._attention_backends import LONGEST_IN_FP32

HOST = "host"
"""The kind of what does not lie on the device; it is counted apart."""

TEMPORARY, ACTIVATIONS, GRADIENTS, GATHERED, TRANSFER = "temporary", "activations", "gradients", "gathered weights", "transfer buffers"

LIBRARIES = ("attention_forward", "attention_backward")
"""Operators of ours whose bodies call a library."""

PROMOTING = ("add", "sub", "rsub", "mul", "div")
"""Operators, in place or not, that PyTorch runs on a CPU after copying operands of another dtype than the result's."""

WITHOUT_MEMORY = ("prim", "profiler")
"""Namespaces of operators that ask or note something and make no tensor."""

COLLECTIVES = {"all_gather_into_tensor": "_allgather_base_", "reduce_scatter": "_reduce_scatter_base_", "all_to_all": "alltoall_base_"}


@dataclass(slots=True)
class Block:
    """A storage that is alive: its bytes, what it is for, and the number of the event that gave it this size."""

    size: int
    kind: str
    since: int


class Ledger(TorchDispatchMode):
    """Notes memory while it is on; `gpu` says whose attention and arithmetic is meant.

    With `device`, the type of a device ("cuda"), tensors that lie elsewhere are host memory; without, all lie on the device.
    `current_bytes` is by kind, `collective_bytes` adds up what each kind of collective makes (all-gather, all-to-all) or takes
    (reduce-scatter).
    """

    def __init__(self, *, gpu: bool, device: str | None = None) -> None:
        super().__init__()
        self._gpu, self._device = gpu, device
        self.current_bytes: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        self._blocks: dict[int, Block] = {}
        self._total = self._peak = 0
        self._events = self._peak_event = 0
        self._gone_since_peak: Counter[str] = Counter()
        self._counting_as = TEMPORARY
        self._resize: Callable[..., Any] = UntypedStorage.resize_

    def __enter__(self) -> Ledger:
        if not self._depth:
            resize = self._resize = UntypedStorage.resize_

            def watched(storage: UntypedStorage, size: int) -> UntypedStorage:
                result = resize(storage, size)
                block = self._blocks.get(id(storage))
                if block is not None:
                    self._change(block, size, block.kind)
                return result

            UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    _depth = 0

    def register(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors that exist already, or give another kind to those that are known, at the peak too if they were alive then.

        What exists before and is not registered counts from the first operator that gives a view of it.
        """
        for tensor in tensors:
            for part in plain_tensors(tensor):
                block = self._note(part, kind)
                if HOST in (kind, block.kind) and kind != block.kind:  # it moved, so it was on one side before and is on the other from now
                    self._change(block, block.size, kind)
                else:
                    self._relabel(block, kind)

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self._counting_as = self._counting_as, kind
        try:
            yield
        finally:
            self._counting_as = before

    def keep(self) -> None:
        """The forward is over: what it has left alive waits for the backward."""
        for block in self._blocks.values():
            if block.kind == TEMPORARY:
                self._relabel(block, ACTIVATIONS)

    @property
    def peak_total(self) -> int:
        """Bytes on the device at the peak."""
        return self._peak

    @property
    def peak_bytes(self) -> Counter[str]:
        """Bytes by kind at the moment of the largest sum without "host"."""
        found = Counter(self._gone_since_peak)
        for block in self._blocks.values():
            if block.since <= self._peak_event:
                found[block.kind] += block.size
        return found

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func.namespace, func._opname
        if namespace in WITHOUT_MEMORY:
            return func(*args, **kwargs)
        if namespace == "structcot" and name not in LIBRARIES:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                for part in plain_tensors(leaf):
                    self._note(part, self._counting_as)
        if namespace == "c10d":
            self._note_collective(name, args)
        elif name == "split_with_sizes_copy" and namespace == "fsdp":
            self.register(kwargs["out"], GATHERED)
        elif name == "chunk_cat" and namespace == "fsdp":
            self.register(args[0], GRADIENTS)
        elif name == "attention_backward":
            _, q_THd, k_TGd, *_, max_seqlen, _, _ = args
            self._surge(flash_workspace_bytes(q_THd, k_TGd) if self._gpu else sdpa_workspace_bytes(q_THd, k_TGd, max_seqlen))
        elif not self._gpu and name.rstrip("_") in PROMOTING:
            self._surge(copied_bytes(args, in_place=name.endswith("_")))
        return result

    def _note_collective(self, operator: str, args: Any) -> None:
        name = next((name for name, known in COLLECTIVES.items() if known == operator), None)
        if name is None:
            return
        result, given = args[:2]
        self.register([result], GRADIENTS if name == "reduce_scatter" else TRANSFER)
        self.register([given] if name == "reduce_scatter" else [], TRANSFER)
        self.collective_bytes[name] += (given if name == "reduce_scatter" else result).nbytes

    def _note(self, tensor: Tensor, kind: str) -> Block:
        """The block of a plain tensor's storage, which is counted from now on if it was not."""
        storage = tensor.untyped_storage()
        block = self._blocks.get(id(storage))
        if block is None:
            if self._device is not None and tensor.device.type != self._device:
                kind = HOST
            block = self._blocks[id(storage)] = Block(0, kind, 0)
            weakref.finalize(storage, self._forget, id(storage))
            self._change(block, storage.nbytes(), kind)
        return block

    def _forget(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._change(block, 0, block.kind)

    def _change(self, block: Block, size: int, kind: str) -> None:
        """Let a block be of another size, or on the other side. What it was at the peak stays there."""
        if block.since <= self._peak_event:
            self._gone_since_peak[block.kind] += block.size
        self._count(block.kind, -block.size)
        self._events += 1
        block.size, block.kind, block.since = size, kind, self._events
        self._count(kind, size)
        if self._total > self._peak:
            self._peak, self._peak_event, self._gone_since_peak = self._total, self._events, Counter()

    def _relabel(self, block: Block, kind: str) -> None:
        """Say what a block turned out to be."""
        self._count(block.kind, -block.size)
        block.kind = kind
        self._count(kind, block.size)

    def _surge(self, num_bytes: int) -> None:
        """Memory that an operator held while it ran, beside its results."""
        if self._total + num_bytes > self._peak:
            self._peak, self._peak_event = self._total + num_bytes, self._events
            self._gone_since_peak = Counter({TEMPORARY: num_bytes})

    def _count(self, kind: str, num_bytes: int) -> None:
        self.current_bytes[kind] += num_bytes
        if kind != HOST:
            self._total += num_bytes


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the memory of one that wraps others: of a DTensor this rank's part, of any other tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[operator]
        part = getattr(tensor, name)
        if isinstance(part, Tensor):  # a DTensor names its mesh, too
            yield from plain_tensors(part)


def copied_bytes(operands: Sequence[Any], *, in_place: bool) -> int:
    """Copies in the common dtype that PyTorch's arithmetic makes on a CPU of operands of another, and once more of a result in place.

    Measured for torch 2.13: fp32 += bf16 holds 4 bytes an element, bf16 += fp32 8, bf16 * fp32 4; a GPU converts inside its kernel.
    """
    tensors = [operand for operand in operands if isinstance(operand, Tensor) and operand.dim()]
    if len({tensor.dtype for tensor in tensors}) < 2:
        return 0
    common = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    copied = [tensor for tensor in (*tensors, *(tensors[:1] if in_place else ())) if tensor.dtype != common]
    return sum(tensor.numel() for tensor in copied) * common.itemsize


def flash_workspace_bytes(q_THd: Tensor, k_TGd: Tensor) -> int:
    """What flash-attn's backward holds beside its results: the sum of dq in fp32, and where heads share keys dk and dv of each head."""
    shared = q_THd.shape[1] != k_TGd.shape[1]
    return q_THd.numel() * (4 + (2 * q_THd.element_size() if shared else 0))


def sdpa_workspace_bytes(q_THd: Tensor, k_TGd: Tensor, max_seqlen: int) -> int:
    """What PyTorch's backward on a CPU with one thread holds for the longest document beside its results.

    First four times its heads and two blocks of scores, whose sizes are those of ATen's FlashAttentionKernel.cpp in torch 2.13; then, where
    this is more, three times its heads and the sums of dk and dv over the heads that share them. A short document's operands are copied
    into fp32 before (`LONGEST_IN_FP32`); where the longest is not short, shorter ones beside it are not looked at. Measured to 0.1 % in
    fp32; in bf16 a thread packs operands into up to 0.24 MB more.
    """
    in_fp32 = max_seqlen <= LONGEST_IN_FP32
    width = 4 if in_fp32 else q_THd.element_size()
    copied = 5 if in_fp32 and q_THd.element_size() < width else 0  # dout, q, k, v and out
    rows = 256 if max_seqlen >= 768 else 64 if max_seqlen >= 192 else 32
    scores = 2 * rows * min(512, max_seqlen) * (4 if width == 4 else 4 + width)
    q_bytes, kv_bytes = (max_seqlen * heads[:1].numel() * width for heads in (q_THd, k_TGd))
    return copied * q_bytes + max(4 * q_bytes + scores, 3 * q_bytes + 2 * kv_bytes)


def in_gib(sizes: Mapping[str, int]) -> dict[str, float]:
    """Sizes by kind in GiB, largest first."""
    return {kind: size / 2**30 for kind, size in sorted(sizes.items(), key=lambda entry: -entry[1]) if size}
