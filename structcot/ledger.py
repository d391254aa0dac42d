"""A ledger of device memory: what is alive at every moment, how much that is at most, and of what kinds it is then.

It watches every operator of the code that runs inside it, on real tensors or on fake ones (torch's FakeTensorMode), so a step can be
weighed that no memory here would hold. A storage counts from the operator that makes it to the end of its last reference; FSDP2 frees and
refills storages in place, which is followed. An operator of our own is run by its real body, whose buffers count; Triton kernels must not
be started then (structcot_kernels.launch.skipped_launches). Attention is a library's, whose buffers are added by formula.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, UntypedStorage
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = "host"
"""The kind of what does not lie on the device; it is counted apart."""

TEMPORARY, ACTIVATIONS, GRADIENTS, GATHERED, TRANSFER = "temporary", "activations", "gradients", "gathered weights", "transfer buffers"

LIBRARIES = ("attention_forward", "attention_backward")
"""Operators of ours whose bodies call a library."""

COLLECTIVES = {"all_gather_into_tensor": "_allgather_base_", "reduce_scatter": "_reduce_scatter_base_", "all_to_all": "alltoall_base_"}


class Ledger(TorchDispatchMode):
    """Notes memory while it is on; `gpu` says whose attention is meant.

    `current_bytes` and `peak_bytes` are by kind, the latter at the moment of the largest sum without "host"; `collective_bytes` adds up
    what each kind of collective makes (all-gather, all-to-all) or takes (reduce-scatter).
    """

    def __init__(self, *, gpu: bool) -> None:
        super().__init__()
        self._gpu = gpu
        self.current_bytes: Counter[str] = Counter()
        self.peak_bytes: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._kinds: dict[int, str] = {}
        self._total = self._peak = 0
        self._counting_as = TEMPORARY
        self._resize: Callable[..., Any] = UntypedStorage.resize_

    def __enter__(self) -> Ledger:
        if not self._depth:
            resize = self._resize = UntypedStorage.resize_

            def watched(storage: UntypedStorage, size: int) -> UntypedStorage:
                result = resize(storage, size)
                self._set_size(storage, size)
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
        """Count tensors that exist already, or give another kind to those that are known."""
        for tensor in tensors:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            self._note(storage, kind)
            self._relabel(id(storage), kind)

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
        for key in [key for key, kind in self._kinds.items() if kind == TEMPORARY]:
            self._relabel(key, ACTIVATIONS)

    @property
    def peak_total(self) -> int:
        """Bytes on the device at the peak."""
        return self._peak

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "structcot" and func._opname not in LIBRARIES:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), self._counting_as)
        if func.namespace == "c10d":
            self._note_collective(func, args)
        elif func.namespace == "fsdp" and func._opname == "split_with_sizes_copy":
            self.register(kwargs["out"], GATHERED)
        elif func._opname == "attention_backward":
            _, q_THd, k_TGd, *_, max_seqlen, _, _ = args
            self._surge(flash_workspace_bytes(q_THd, k_TGd) if self._gpu else sdpa_workspace_bytes(q_THd, max_seqlen))
        return result

    def _note_collective(self, func: OpOverload, args: Any) -> None:
        name = next((name for name, operator in COLLECTIVES.items() if operator == func._opname), None)
        if name is None:
            return
        result, given = args[:2]
        self.register([result], GRADIENTS if name == "reduce_scatter" else TRANSFER)
        self.register([given] if name == "reduce_scatter" else [], TRANSFER)
        self.collective_bytes[name] += (given if name == "reduce_scatter" else result).nbytes

    def _note(self, storage: UntypedStorage, kind: str) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key], self._kinds[key] = 0, kind
            weakref.finalize(storage, self._forget, key)
            self._set_size(storage, storage.size())

    def _forget(self, key: int) -> None:
        self._add(self._kinds.pop(key), -self._sizes.pop(key))

    def _set_size(self, storage: UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._sizes:
            self._add(self._kinds[key], size - self._sizes[key])
            self._sizes[key] = size

    def _relabel(self, key: int, kind: str) -> None:
        size = self._sizes[key]
        self._add(self._kinds[key], -size)
        self._kinds[key] = kind
        self._add(kind, size)

    def _surge(self, num_bytes: int) -> None:
        """Memory that an operator held while it ran, beside its results."""
        self._add(TEMPORARY, num_bytes)
        self._add(TEMPORARY, -num_bytes)

    def _add(self, kind: str, num_bytes: int) -> None:
        self.current_bytes[kind] += num_bytes
        if kind != HOST:
            self._total += num_bytes
        if self._total > self._peak:
            self._peak, self.peak_bytes = self._total, Counter(self.current_bytes)


def flash_workspace_bytes(q_THd: Tensor, k_TGd: Tensor) -> int:
    """What flash-attn's backward holds beside its results: the sum of dq in fp32, and where heads share keys dk and dv of each head."""
    shared = q_THd.shape[1] != k_TGd.shape[1]
    return q_THd.numel() * (4 + (2 * q_THd.element_size() if shared else 0))


def sdpa_workspace_bytes(q_THd: Tensor, max_seqlen: int) -> int:
    """What PyTorch's backward on a CPU with one thread holds for the longest document: four times its heads, and two blocks of scores.

    The sizes of the blocks are those of ATen's FlashAttentionKernel.cpp in torch 2.13.
    """
    width = q_THd.element_size()
    rows = 256 if max_seqlen >= 768 else 64 if max_seqlen >= 192 else 32
    scores = 2 * rows * min(512, max_seqlen) * (4 if width == 4 else 4 + width)
    return 4 * max_seqlen * q_THd[:1].numel() * width + scores


def in_gib(sizes: Mapping[str, int]) -> dict[str, float]:
    """Sizes by kind in GiB, largest first."""
    return {kind: size / 2**30 for kind, size in sorted(sizes.items(), key=lambda entry: -entry[1]) if size}
