"""Activations in host memory between forward and backward, for `parallel.cpu_offload = "activations"`.

    memory = HostMemory(device)             # once a run
    with offloaded_activations(memory):     # once a micro-batch, around the blocks and not the loss, which is asked for at once
        hidden_TD = blocks(hidden_TD)
    ...
    loss.backward()

A group is what one node of the graph saves: a decoder's block makes two of them, attention and MLP. In the forward a group leaves the
device when `LOOKAHEAD` later ones are complete, on a stream of its own, so the last groups, which the backward asks for first, never leave.
In the backward the groups come back in reverse, `LOOKAHEAD` of them ahead of the one that is asked for. So a copy has a block's computation
to hide behind, and the device holds what two blocks save at most.

What is copied is always a whole storage, so views stay views, strides stay as they were, and what is saved twice is copied once. Memory on
the device belongs to the stream that computes: that stream waits for a copy to end before the memory that it read is free, and a copy waits
for whatever last used the memory that it writes. So the allocator may use every block again at once, however far Python is ahead.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from structcot.errors import ConfigError

MIN_BYTES = 2**20
"""What is smaller stays where it is: a copy has its price, too."""

LOOKAHEAD = 2
"""Groups that a copy has to hide behind: attention and MLP, one block."""

SLAB_BYTES = 2**30
"""Host memory that is pinned at a time. A power of two, as PyTorch rounds pinned allocations up to one."""

ALIGNMENT_BYTES = 512

Event = torch.cuda.Event | None
"""A point in a stream; None on a CPU, where everything has happened when the call returns."""


def host_empty(num_bytes: int, *, pinned: bool) -> Tensor:
    """Uninitialised host memory, (num_bytes,) uint8: all memory that holds copies of what lies on a device comes from here.

    Raises:
        ConfigError: if the machine does not have that much to give.
    """
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    except RuntimeError as error:
        raise ConfigError(
            f"parallel.cpu_offload: this machine cannot give {num_bytes / 2**30:.2f} GiB more of {'pinned ' if pinned else ''}host memory:"
            f' {error}; use "none", or where activations go there a lower parallel.max_tokens_per_microbatch'
        ) from error


class HostMemory:
    """Host memory for copies of what lies on `device`, kept in slabs that are used again, and the stream that copies.

    Pinning memory is slow, so nothing is given back to the system. On a CPU a copy is made at once and nothing is pinned. Activations come
    here whose storage has at least `min_bytes`.
    """

    def __init__(self, device: torch.device, *, slab_bytes: int = SLAB_BYTES, min_bytes: int = MIN_BYTES, empty=host_empty):
        self.device, self.min_bytes = device, min_bytes
        self._slab_bytes, self._empty = slab_bytes, empty
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[Tensor] = []

    def take_slab(self, num_bytes: int) -> Tensor:
        """At least `num_bytes` of host memory: one that was given back, or a new one."""
        for index, slab in enumerate(self._free):
            if slab.numel() >= num_bytes:
                return self._free.pop(index)
        return self._empty(max(self._slab_bytes, 1 << max(0, num_bytes - 1).bit_length()), pinned=self._stream is not None)

    def give_back(self, slabs: Sequence[Tensor], compute: torch.cuda.Stream | None) -> None:
        """Take `slabs` from a user that is gone; what it still had copied back must not meet later work of the stream `compute`."""
        if compute is not None and self._stream is not None:
            compute.wait_stream(self._stream)
        self._free += slabs

    def compute_stream(self) -> torch.cuda.Stream | None:
        """The stream of the caller's computation."""
        return None if self._stream is None else torch.cuda.current_stream(self.device)

    def mark(self) -> Event:
        """The point that the caller's computation has come to."""
        return event_of(self.compute_stream())

    def wait(self, event: Event) -> None:
        """Let the caller's computation go on after `event` only."""
        compute = self.compute_stream()
        if compute is not None and event is not None:
            compute.wait_event(event)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Event) -> Event:
        """Copy (target, source) pairs beside the computation once `after` has passed; the event of their end."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return event_of(self._stream)


def event_of(stream: torch.cuda.Stream | None) -> Event:
    """The end of what `stream` has been given so far."""
    if stream is None:
        return None
    event = torch.cuda.Event()
    event.record(stream)
    return event


class Shelf:
    """Tensors in host memory, one behind the other in slabs of `memory`."""

    def __init__(self, memory: HostMemory):
        self.slabs: list[Tensor] = []
        self._memory, self._used_bytes = memory, 0

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Room for a copy of `tensor`, without gaps. It is the caller's until the slabs are given back.

        Raises:
            ConfigError: if the machine has no more memory to give.
        """
        num_bytes = padded_bytes(tensor)
        if not self.slabs or self._used_bytes + num_bytes > self.slabs[-1].numel():
            self.slabs.append(self._memory.take_slab(num_bytes))
            self._used_bytes = 0
        start, self._used_bytes = self._used_bytes, self._used_bytes + num_bytes
        return self.slabs[-1][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def padded_bytes(tensor: Tensor) -> int:
    """What a copy of `tensor` takes of a slab, so that the next one begins at a round address."""
    return -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@contextmanager
def offloaded_activations(memory: HostMemory) -> Iterator[None]:
    """Keep in `memory` what the forward inside saves for its backward: floats on its device that are large enough.

    Parameters and views of them stay, and so does a tensor of less than half its storage. The backward may run any time later, in the
    order of autograd. Host memory is given back when the last of the graph is gone, after a backward or without one.

    Raises:
        ConfigError: if the machine has no more memory to give.
    """
    tape = Tape(memory)
    with saved_tensors_hooks(tape.pack, tape.unpack):
        yield
    tape.close()


@dataclass(slots=True, eq=False)
class Stored:
    """A storage that was saved: its elements (N,) on the device, on the host, or both.

    `group` is the last one that saved it, `uses` how often it is yet to be asked for, `arrived` the end of its way back.
    """

    key: tuple[int, torch.dtype]
    group: int
    device: Tensor | None
    host: Tensor | None = None
    uses: int = 0
    arrived: Event = None


class Saved(NamedTuple):
    """What the graph holds in place of a tensor: where it is, the group that saved it, and its place in the storage, in elements."""

    stored: Stored
    group: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Tape:
    """What one forward saves. It lives as long as a part of the graph does, and its host memory with it.

    A second backward through the same graph finds everything again, as autograd itself decides when something is no longer needed.
    """

    def __init__(self, memory: HostMemory):
        self._memory, self._shelf = memory, Shelf(memory)
        self._node: int | None = None
        self._groups: list[list[Stored]] = []
        self._complete: list[Event] = []
        self._known: dict[tuple[int, torch.dtype], Stored] = {}
        self._leaving: list[Stored] = []
        self._left: Event = None
        finalizer = weakref.finalize(self, memory.give_back, self._shelf.slabs, memory.compute_stream())
        finalizer.atexit = False

    def pack(self, tensor: Tensor) -> Saved | Tensor:
        """Called by autograd for each tensor that a node saves."""
        if not self._is_worth_it(tensor):
            return tensor if tensor.is_leaf else tensor.detach()  # an output would hold its own node, and nothing would free them
        self._begin_group(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        group, key = len(self._groups) - 1, (tensor.untyped_storage()._cdata, tensor.dtype)
        stored = self._known.get(key)
        if stored is None:
            stored = self._known[key] = Stored(key, group, whole_storage(tensor))
        if stored not in self._groups[group]:
            self._groups[group].append(stored)
        stored.group, stored.uses = group, stored.uses + 1
        return Saved(stored, group, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, saved: Saved | Tensor) -> Tensor:
        """Called by autograd when a node's backward asks for what it saved."""
        if isinstance(saved, Tensor):
            return saved
        self._release()
        stored, first = saved.stored, max(0, saved.group - LOOKAHEAD)
        for group in reversed(self._groups[first : saved.group + 1]):
            self._fetch([other for other in group if other.uses > 0])
        self._fetch([stored])
        self._memory.wait(stored.arrived)
        tensor = stored.device.as_strided(saved.shape, saved.stride, saved.offset)  # type: ignore[union-attr]
        stored.uses, stored.arrived = stored.uses - 1, None
        if stored.uses <= 0 and stored.host is not None:
            stored.device = None  # whoever asked holds it now, and may let go of it early
        return tensor

    def close(self) -> None:
        """The forward is over. What has not left stays, held by nobody but the graph."""
        self._release()
        self._known.clear()
        self._groups = [[stored for stored in group if stored.host is not None] for group in self._groups]

    def _is_worth_it(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or not tensor.is_floating_point() or isinstance(tensor, DTensor) or is_parameter(tensor):
            return False
        storage_bytes = tensor.untyped_storage().nbytes()
        return (
            tensor.device.type == self._memory.device.type
            and storage_bytes >= self._memory.min_bytes
            and 2 * tensor.nbytes >= storage_bytes
        )

    def _begin_group(self, node: int) -> None:
        """Nodes are told apart by the number that the next one will get."""
        if node == self._node:
            return
        self._node = node
        if self._groups:
            self._complete.append(self._memory.mark())
        self._groups.append([])
        self._release()
        leaving = len(self._groups) - 2 - LOOKAHEAD
        if leaving >= 0:
            self._send(leaving)

    def _send(self, group: int) -> None:
        """Begin to copy to the host what `group` was the last to save."""
        leaving, pairs = [], []
        for stored in self._groups[group]:
            if stored.group == group and stored.host is None and stored.device is not None and is_filled(stored.device):
                stored.host = self._shelf.empty_like(stored.device)
                leaving.append(stored)
                pairs.append((stored.host, stored.device))
        self._left = self._memory.copy(pairs, self._complete[group])
        self._leaving = leaving

    def _release(self) -> None:
        """Free what was sent, once it is copied."""
        if self._leaving:
            self._memory.wait(self._left)
        for stored in self._leaving:
            stored.device = None
            self._known.pop(stored.key, None)  # another storage may soon lie at the same place
        self._leaving = []

    def _fetch(self, wanted: Iterable[Stored]) -> None:
        """Begin to copy back what is on the host only."""
        away = [stored for stored in wanted if stored.device is None]
        if not away:
            return
        pairs = []
        for stored in away:
            stored.device = torch.empty(stored.host.shape, dtype=stored.host.dtype, device=self._memory.device)  # type: ignore[union-attr]
            pairs.append((stored.device, stored.host))
        arrived = self._memory.copy(pairs, self._memory.mark())
        for stored in away:
            stored.arrived = arrived


def is_parameter(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter, or a view of one: frozen or not, sharded or gathered by FSDP2, which frees and fills them itself."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)


def whole_storage(tensor: Tensor) -> Tensor:
    """All elements of the storage of `tensor`, (N,)."""
    return tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def is_filled(elements: Tensor) -> bool:
    """Whether the storage still is what it was: FSDP2 empties those of its parameters, and an alias of one is none by its type."""
    return elements.untyped_storage().nbytes() >= elements.nbytes
