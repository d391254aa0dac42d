"""The processes of a run: which ranks there are, what they decide together, and how one learns what happened to another.

Ranks run the same code and meet in collective operations, so what one of them decides alone (to stop, to give up) would leave the others
waiting. Whatever may differ between ranks is therefore asked of all: `World.any` for a flag, `World.sum` for numbers, and `World.agreed`
around work without collectives, which ends on every rank with the same error if it fails on one. These go over gloo on the CPU, so they
neither wait for a GPU nor are held up by one.

A rank that dies breaks the connections of the others, which then end as well; one that hangs is found by `structcot.watchdog`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from structcot.config import ParallelConfig
from structcot.errors import ConfigError, Interrupted, RankLost, StructcotError, ToldElsewhere
from structcot.signals import StopFlag, StopRequested

Result = TypeVar("Result")

MARGIN_SECONDS = 60
"""A collective gives up this much later than a rank that hangs, so that the hang is reported and not the wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks of a run as one of them sees them.

    Consecutive ranks, `sequence` of them, share the documents of a micro-batch. `mesh` (replicate, shard) is what weights are sharded
    over, or None where they are not; `control` and `saving` are gloo groups for decisions and for checkpoints, None for one rank.
    """

    rank: int = 0
    size: int = 1
    sequence: int = 1
    mesh: DeviceMesh | None = None
    sequence_group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes what all share."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of a step's documents this rank works on."""
        return self.rank // self.sequence

    @property
    def num_data_ranks(self) -> int:
        """Shares that a step's documents are spread over."""
        return self.size // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Which slice of its documents' tokens this rank works on."""
        return self.rank % self.sequence

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank."""
        return bool(self.maximum(float(flag)))

    def maximum(self, value: float) -> float:
        """The largest `value` of all ranks."""
        if self.size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return float(values)

    def sum(self, values: Tensor) -> Tensor:
        """`values` (fp64, on the CPU) added up over all ranks."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives on the first rank, on every rank; its error as well."""
        result: Any = None
        with self.agreed():
            if self.is_first:
                result = work()
        if self.size > 1:
            box = [result]
            dist.broadcast_object_list(box, src=0, group=self.control)
            (result,) = box
        return result

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Work without collectives that succeeds on all ranks or ends on all of them, with the error of the first rank that failed.

        Raises:
            StructcotError, OSError, StopRequested: what that rank raised; the message is shown by the first rank alone.
        """
        failure: BaseException | None = None
        try:
            yield
        except (StructcotError, OSError, StopRequested) as error:
            failure = error
        first = next((error for error in self.gather(failure) if error is not None), None)
        if first is None:
            return
        if self.size == 1 or isinstance(first, StopRequested | Interrupted):
            raise first
        if self.is_first:
            raise first from failure
        raise ToldElsewhere(getattr(first, "exit_status", 1)) from failure

    def check(self, stop: StopFlag) -> None:
        """Leave here, on every rank, if a signal asked one of them to stop.

        Raises:
            StopRequested: if one did.
        """
        names = self.gather(stop.signal_name) if self.any(stop.is_set()) else []
        if names:
            stop.signal_name = next(name for name in names if name)
            raise StopRequested


@contextmanager
def joined(parallel: ParallelConfig, device: torch.device) -> Iterator[World]:
    """The ranks that torchrun has started, connected; where it has not, this process alone, which may shard over itself.

    Raises:
        ConfigError: if their number does not fit `parallel`.
    """
    size = num_processes()
    need_layout(parallel, size)
    needs_mesh = size > 1 or parallel.cpu_offload == "parameters"
    if not needs_mesh:
        yield World()
        return
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(f"WORLD_SIZE is {size}, but nothing says where the other processes are (MASTER_ADDR); start them by torchrun")
    wait = timedelta(seconds=parallel.hang_seconds + MARGIN_SECONDS)
    store, rank = HashStore(), 0
    if size > 1:
        # torchrun may keep one store over all its restarts, in which what the ranks before wrote of their addresses would be read again.
        store, rank, _ = next(rendezvous("env://", timeout=wait))
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=wait, device_id=device if device.type == "cuda" else None
    )
    try:
        yield make_world(parallel, device, wait)
    finally:
        dist.destroy_process_group()


def make_world(parallel: ParallelConfig, device: torch.device, wait: timedelta) -> World:
    """The world of the process group that this process has joined."""
    size = dist.get_world_size()
    shape = (parallel.replicate, size // parallel.replicate)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    sequence_group = None
    if parallel.sequence > 1:
        slices = init_device_mesh(device.type, (size // parallel.sequence, parallel.sequence), mesh_dim_names=("data", "sequence"))
        sequence_group = slices.get_group("sequence")
    control, saving = (gloo_group(wait) for _ in range(2))
    return World(
        rank=dist.get_rank(),
        size=size,
        sequence=parallel.sequence,
        mesh=mesh if parallel.replicate > 1 else mesh["shard"],
        sequence_group=sequence_group,
        control=control,
        saving=saving,
    )


def gloo_group(wait: timedelta) -> dist.ProcessGroup:
    """A group of all ranks that talks over the CPU."""
    group = dist.new_group(backend="gloo", timeout=wait)
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError("torch.distributed gave no group of all ranks")
    return group


def num_processes() -> int:
    """Ranks of this run, as torchrun has set them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def need_layout(parallel: ParallelConfig, size: int) -> None:
    """Refuse a layout that does not make `size` ranks.

    Raises:
        ConfigError: naming the keys and what would fit.
    """
    processes = f"{size} process{'es' if size > 1 else ''}"
    shard = size // parallel.replicate if parallel.shard == -1 else parallel.shard
    if shard * parallel.replicate != size:
        raise ConfigError(
            f"parallel: got shard = {parallel.shard} and replicate = {parallel.replicate} for {processes}; their product must be that"
            " number: leave shard at -1 and let replicate divide it, or start another number of processes"
        )
    if size % parallel.sequence:
        raise ConfigError(
            f"parallel.sequence: got {parallel.sequence} for {processes}, which it does not divide; use a smaller degree or start more"
        )


def need_shared_heads(parallel: ParallelConfig, num_heads: int) -> None:
    """Refuse a degree by which ranks cannot share the attention heads of a model evenly.

    Raises:
        ConfigError: naming the degree and the heads.
    """
    if num_heads % parallel.sequence:
        raise ConfigError(
            f"parallel.sequence: got {parallel.sequence}, which does not divide the model's {num_heads} heads; use a degree that does"
        )


@contextmanager
def connected() -> Iterator[None]:
    """Turn the error of a broken connection into one that says so.

    Raises:
        RankLost: if another rank ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:  # gloo and the store raise nothing more special
        if not is_lost_connection(error):
            raise
        raise RankLost(
            f"rank {os.environ.get('RANK', '0')}: another rank has ended or does not answer: {str(error).splitlines()[0]};"
            " see the messages of the other ranks; the same command goes on from the last complete checkpoint"
        ) from error


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that a peer is gone."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return "gloo" in str(error) or "Connection closed by peer" in str(error) or "Broken pipe" in str(error)
