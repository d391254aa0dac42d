"""Activations in host memory: the same bits come back in time, and of a forward nothing is left when its graph is gone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from structcot.config import Config
from structcot.data.batch import MicroBatch
from structcot.distributed import joined
from structcot.errors import ConfigError
from structcot.model.decoder import Decoder
from structcot.model.parts import whole_on_cpu
from structcot.model.weights import build_model
from structcot.offload import LOOKAHEAD, HostMemory, Shelf, host_empty, offloaded_activations
from tests.one_step import feed_of
from tests.ranks import fill_adapters, on_ranks
from tests.tiny_models import random_samples, tiny_checkpoint, tiny_config

CPU = torch.device("cpu")
MIN_BYTES = 4000  # of a tiny model all that blocks save of 40 tokens and more, but not its adapters' inputs
NUM_LAYERS = 4
SENT = 2 * NUM_LAYERS - 1 - LOOKAHEAD  # groups of a forward that leave: two a layer, without the last of them


@dataclass(frozen=True)
class Source:
    """What a copy read, which it does not keep alive."""

    storage: StorageWeakRef
    numel: int
    first: float

    @classmethod
    def of(cls, tensor: Tensor) -> Source:
        fake = isinstance(tensor, FakeTensor)
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.numel(), 0.0 if fake else float(tensor.flatten()[0]))


class Noted(HostMemory):
    """Host memory in small slabs that notes its slabs, and what every group of copies reads, to the host and back."""

    def __init__(self, min_bytes: int = MIN_BYTES):
        super().__init__(CPU, slab_bytes=2**16, min_bytes=min_bytes)
        self.slabs: list[Tensor] = []
        self.to_host: list[list[Source]] = []
        self.to_device: list[list[Source]] = []
        self.came_back: list[StorageWeakRef] = []

    def take_slab(self, num_bytes: int) -> Tensor:
        slab = super().take_slab(num_bytes)
        if all(slab is not known for known in self.slabs):
            self.slabs.append(slab)
        return slab

    def copy(self, pairs: Any, after: Any) -> Any:
        pairs, on_host = list(pairs), {storage_of(slab) for slab in self.slabs}
        if pairs:
            goes_to_host = storage_of(pairs[0][0]) in on_host
            (self.to_host if goes_to_host else self.to_device).append([Source.of(source) for _, source in pairs])
            self.came_back += [] if goes_to_host else [StorageWeakRef(target.untyped_storage()) for target, _ in pairs]
        return super().copy(pairs, after)

    @property
    def storages(self) -> set[int]:
        """Of all that was copied to the host."""
        return {source.storage.cdata for sources in self.to_host for source in sources}

    @property
    def all_is_given_back(self) -> bool:
        """Slabs are free, and so is the memory on the device that held what came back."""
        return len(self._free) == len(self.slabs) and all(storage.expired() for storage in self.came_back)


class Late(HostMemory):
    """A stream that copies only when somebody waits for it: who frees too early what a copy reads or writes, or never waits, shows."""

    def __init__(self, min_bytes: int = MIN_BYTES):
        super().__init__(CPU, slab_bytes=2**16, min_bytes=min_bytes)
        self.waiting: list[tuple[Place, Place]] = []
        self.num_made, self.failures = 0, []

    def mark(self) -> Any:
        return 0

    def copy(self, pairs: Any, after: Any) -> Any:
        self.failures += ["begins before what it reads is made, or what it writes is free"] if after is None else []
        for target, source in pairs:
            target.fill_(torch.nan)
            self.waiting.append((Place.of(target), Place.of(source)))
        return self.num_made + len(self.waiting)

    def wait(self, event: Any) -> None:
        while event is not None and self.num_made < event:
            target, source = (place.tensor() for place in self.waiting.pop(0))
            self.num_made += 1
            if target is None or source is None:
                self.failures.append("what a copy needs was freed before its end")
            else:
                target.copy_(source)

    def give_back(self, slabs: Any, compute: Any) -> None:
        self.wait(self.num_made + len(self.waiting))
        super().give_back(slabs, compute)


@dataclass(frozen=True)
class Place:
    """Where the elements of a tensor without gaps lie, which it does not keep alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    numel: int

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, int(tensor.storage_offset()), tensor.numel())

    def tensor(self) -> Tensor | None:
        storage = None if self.storage.expired() else torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return None if storage is None else torch.empty(0, dtype=self.dtype).set_(storage, self.offset, (self.numel,))


# A whole model


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {kind: tiny_checkpoint(directory / kind, kind, num_hidden_layers=NUM_LAYERS) for kind in ("qwen2", "qwen3")}


@pytest.mark.parametrize("recompute", ["none", "block", "full"])
@pytest.mark.parametrize(("kind", "tuning"), [("qwen2", {"lora_dropout": 0.1}), ("qwen3", {}), ("qwen3", {"method": "full"})], ids=str)
def test_losses_and_gradients_are_the_same_bits(kind: str, tuning: dict[str, Any], recompute: str, model_dirs: dict[str, Path]) -> None:
    config = config_of(model_dirs[kind], tuning)
    model, batches = prepare(config, recompute)
    memory = Noted()
    wanted, got = losses_and_gradients(model, batches, None), losses_and_gradients(model, batches, memory)
    assert len(batches) > 2
    assert len(memory.to_host) == len(memory.to_device) == len(batches) * SENT
    assert_same(got, wanted)
    late = Late()
    assert_same(losses_and_gradients(model, batches, late), wanted)
    assert late.num_made > len(batches) * SENT
    assert not late.failures


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_parameter_and_no_rotary_table_is_ever_copied(method: str, model_dirs: dict[str, Path]) -> None:
    model, batches = prepare(config_of(model_dirs["qwen3"], {"method": method}), "none")
    memory = Noted()
    losses_and_gradients(model, batches, memory)
    assert model._tables is not None
    stay = [*model._tables, *(parameter for parameter in model.parameters() if min(parameter.shape) > 4 and parameter.dim() > 1)]
    assert all(tensor.untyped_storage().nbytes() >= MIN_BYTES for tensor in stay), "too small to tell"
    assert len(memory.storages) >= 5 * SENT
    assert not memory.storages & {storage_of(tensor) for tensor in (*stay, *model.parameters())}


def test_after_the_backward_nothing_is_left_and_slabs_are_used_again(model_dirs: dict[str, Path]) -> None:
    model, batches = prepare(config_of(model_dirs["qwen2"], {}), "none")
    memory = Noted()
    with no_garbage_collection():
        losses_and_gradients(model, batches, memory)
        num_slabs = len(memory.slabs)
        assert num_slabs > 1
        assert memory.all_is_given_back
        losses_and_gradients(model, batches[::-1], memory)
        assert len(memory.slabs) == num_slabs
        assert memory.all_is_given_back


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_left_is_gone_from_the_device_when_the_forward_is_over(recompute: str, model_dirs: dict[str, Path]) -> None:
    model, (batch, *_) = prepare(config_of(model_dirs["qwen2"], {}), recompute)
    model.host_memory = memory = Noted()
    with no_garbage_collection():
        loss_sum, _ = model(batch)
        assert loss_sum.requires_grad
        assert len(memory.to_host) == SENT
        assert all(source.storage.expired() for sources in memory.to_host for source in sources)


def test_an_evaluation_copies_nothing(model_dirs: dict[str, Path]) -> None:
    model, (batch, *_) = prepare(config_of(model_dirs["qwen2"], {}), "none")
    model.host_memory = memory = Noted()
    with torch.no_grad():
        model(batch)
    assert not memory.slabs


def test_a_planner_runs_it_on_tensors_without_memory(model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, (batch, *_) = prepare(config_of(model_dirs["qwen2"], {}), "block")
    claimed: list[Tensor] = []

    def noted(num_bytes: int, *, pinned: bool) -> Tensor:
        claimed.append(host_empty(num_bytes, pinned=pinned))
        return claimed[-1]

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.host_memory = memory = Noted()
        monkeypatch.setattr(memory, "_empty", noted)
        model(batch)[0].backward()
    assert claimed
    assert all(isinstance(slab, FakeTensor) for slab in claimed)
    assert len(memory.to_host) == len(memory.to_device) == SENT


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_with_sharded_parameters_get_the_same_bits(method: str, model_dirs: dict[str, Path]) -> None:
    on_ranks(2, compare_sharded, config_of(model_dirs["qwen2"], {"method": method}))


def compare_sharded(config: Config) -> None:
    """FSDP2 gathers the parameters of a block and empties them again: none is copied, and gradients are the same bits."""
    with joined(config.parallel, CPU) as world:
        model, batches = prepare(config, "none", world.mesh)
        memory, numbers = Noted(), {parameter.numel() for parameter in model.parameters()}
        wanted, got = losses_and_gradients(model, batches, None), losses_and_gradients(model, batches, memory)
        assert len(memory.to_host) == len(memory.to_device) == len(batches) * SENT
        assert not numbers & {source.numel for sources in memory.to_host for source in sources}
        assert_same(got, wanted)


# Small graphs


class Keep(torch.autograd.Function):
    """2 x, whose backward asks for everything in `kept` and notes what came back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, notes: list[list[Tensor]], *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.notes = notes
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept = ctx.saved_tensors
        ctx.notes.append(list(kept))
        return 2.0 * grad, None, *(None for _ in kept)


def test_what_comes_back_has_values_shape_strides_and_place_of_what_was_saved() -> None:
    whole = torch.randn(8, 6, 4)
    views = [whole, whole.flatten(1), whole.transpose(0, 2), whole[1:], whole[:, 1:5, :3], torch.randn(6, 8).T]
    narrow = torch.randn(64).bfloat16()
    memory, notes = Noted(min_bytes=1), []
    out = run_chain(memory, [[*views, narrow], *[[torch.randn(4)]] * (LOOKAHEAD + 1)], notes)
    out.sum().backward()
    for copies in (memory.to_host, memory.to_device):
        assert sum(len(sources) for sources in copies) == 3, "a storage is copied once, whatever the views of it"
    for got, wanted in zip(notes[-1], [*views, narrow], strict=True):
        assert torch.equal(got, wanted)
        assert (got.stride(), got.storage_offset(), got.dtype) == (wanted.stride(), wanted.storage_offset(), wanted.dtype)
    assert storage_of(notes[-1][0]) == storage_of(notes[-1][3]) != storage_of(whole)


def test_groups_come_back_ahead_of_their_use_and_only_a_block_ahead() -> None:
    memory, seen = Noted(min_bytes=1), []

    class Watched(list):
        def append(self, got: list[Tensor]) -> None:
            seen.append((int(got[0][0]), [int(sources[0].first) for sources in memory.to_device]))

    out = run_chain(memory, [[torch.full((4,), float(number))] for number in range(8)], Watched())
    assert [int(sources[0].first) for sources in memory.to_host] == [0, 1, 2, 3, 4], "the last three stay"
    out.sum().backward()
    assert seen == [
        (7, []),
        (6, [4]),
        (5, [4, 3]),
        (4, [4, 3, 2]),
        (3, [4, 3, 2, 1]),
        (2, [4, 3, 2, 1, 0]),
        (1, [4, 3, 2, 1, 0]),
        (0, [4, 3, 2, 1, 0]),
    ]


def test_memory_of_the_device_is_free_as_soon_as_its_node_is_done() -> None:
    memory, made, alive = Noted(min_bytes=1), [], []

    def make() -> list[Tensor]:
        tensor = torch.randn(4)
        made.append(StorageWeakRef(tensor.untyped_storage()))
        return [tensor]

    class Forgetful(list):
        def append(self, got: list[Tensor]) -> None:
            alive.append(sum(not storage.expired() for storage in (*made, *memory.came_back)))

    out = run_chain(memory, [make] * 12, Forgetful())
    assert sum(not storage.expired() for storage in made) == LOOKAHEAD + 1
    out.sum().backward()
    assert alive == [LOOKAHEAD + 1] * (12 - LOOKAHEAD) + list(range(LOOKAHEAD, 0, -1))


def test_what_one_node_after_the_other_saves_stays() -> None:
    memory, notes, table = Noted(min_bytes=1), [], torch.randn(16)
    out = run_chain(memory, [[table, torch.randn(4)] for _ in range(8)], notes)
    out.sum().backward()
    assert all(len(sources) == 1 for sources in memory.to_host)
    assert {storage_of(got[0]) for got in notes} == {storage_of(table)}


def test_what_is_saved_again_after_it_left_comes_back_to_both() -> None:
    memory, notes, again = Noted(min_bytes=1), [], torch.randn(16)
    groups = [[again], *[[torch.randn(4)] for _ in range(LOOKAHEAD + 1)], [again], *[[torch.randn(4)] for _ in range(LOOKAHEAD + 1)]]
    run_chain(memory, groups, notes).sum().backward()
    assert all(torch.equal(got[index], again) for got in (notes[-1], notes[LOOKAHEAD + 1]) for index in range(1))


def test_a_place_in_memory_that_is_used_again_is_another_storage() -> None:
    places, notes = [], []

    def made(number: int) -> list[Tensor]:
        tensor = torch.full((64,), float(number))
        places.append(storage_of(tensor))
        return [tensor]

    memory = HostMemory(CPU, slab_bytes=2**16, min_bytes=1)
    run_chain(memory, [partial(made, number) for number in range(24)], notes).sum().backward()
    assert len(set(places)) < 24, "no place was used again"
    assert [int(got[0].mean()) for got in notes[::-1]] == list(range(24))


def test_only_large_floats_that_fill_their_storage_leave() -> None:
    floats, parameter = torch.randn(64), nn.Parameter(torch.randn(64))
    frozen = nn.Parameter(torch.randn(64), requires_grad=False)
    leaf = torch.randn(64, requires_grad=True)
    sparse = torch.eye(16).to_sparse()
    stay = [torch.randn(31), torch.arange(64), torch.randn(129)[:64], parameter, frozen, frozen.view(8, 8), parameter[1:], leaf, sparse]
    memory, notes = Noted(min_bytes=128), []
    run_chain(memory, [[floats, *stay], *[[torch.randn(64)] for _ in range(LOOKAHEAD + 1)]], notes).sum().backward()
    assert memory.storages == {storage_of(floats)}
    assert len(notes[-1]) == 1 + len(stay)
    assert all(
        got is wanted or torch.equal(got.to_dense(), wanted.to_dense()) for got, wanted in zip(notes[-1], [floats, *stay], strict=True)
    )


def test_an_alias_of_a_parameter_that_was_emptied_is_not_read() -> None:
    gathered = torch.randn(64)
    values, alias = gathered.clone(), gathered.detach()
    memory, notes = Noted(min_bytes=1), []
    empty: list[Callable[[], list[Tensor]]] = [lambda: [gathered.untyped_storage().resize_(0), torch.randn(4)][1:]]
    out = run_chain(memory, [[alias], *empty, *[[torch.randn(4)] for _ in range(LOOKAHEAD + 1)]], notes)
    assert len(memory.to_host) == 1
    assert storage_of(gathered) not in memory.storages
    gathered.untyped_storage().resize_(256)
    gathered.copy_(values)
    out.sum().backward()
    assert torch.equal(notes[-1][0], values)


def test_an_output_that_stays_does_not_keep_its_graph_alive() -> None:
    with no_garbage_collection():
        with offloaded_activations(Noted()):
            out = torch.randn(8, requires_grad=True).exp()
        storage = StorageWeakRef(out.untyped_storage())
        assert not storage.expired()
        del out
        assert storage.expired()


# When things go another way


def test_a_second_backward_through_the_same_graph_gives_the_same() -> None:
    memory, notes, kept = Late(min_bytes=1), [], [torch.randn(16) for _ in range(8)]
    out = run_chain(memory, [[tensor] for tensor in kept], notes)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert not memory.failures
    for got in (notes[:8], notes[8:]):
        assert all(torch.equal(values[0], wanted) for values, wanted in zip(got, kept[::-1], strict=True))
    assert memory.num_made == 3 * (8 - 1 - LOOKAHEAD)


def test_a_backward_inside_gets_the_same_bits() -> None:
    memory, means, wanted = Late(min_bytes=1), [], [float(number) for number in range(8)]

    class Averaging(list):
        def append(self, got: list[Tensor]) -> None:
            means.append(float(got[0].mean()))

    with offloaded_activations(memory):
        out = torch.ones(2, requires_grad=True)
        for number in wanted:
            out = Keep.apply(out, Averaging(), torch.full((16,), number))
        out.sum().backward(retain_graph=True)
        out.sum().backward()
    assert means == 2 * wanted[::-1]
    assert not memory.failures


def test_a_graph_that_is_dropped_gives_its_memory_back() -> None:
    memory = Noted(min_bytes=1)
    with no_garbage_collection():
        out = run_chain(memory, [[torch.randn(16)] for _ in range(8)], [])
        assert not memory.all_is_given_back
        del out
        assert memory.all_is_given_back


def test_what_is_on_its_way_back_ends_before_the_memory_of_a_dropped_graph_is_free() -> None:
    memory = Late(min_bytes=1)

    class Failing(list):
        def append(self, got: list[Tensor]) -> None:
            if len(memory.waiting) == 2:
                raise ArithmeticError("on purpose")

    with no_garbage_collection():
        out = run_chain(memory, [[torch.randn(16)] for _ in range(8)], Failing())
        with pytest.raises(ArithmeticError, match="on purpose"):
            out.sum().backward()
        assert memory.waiting
        del out
    gc.collect()
    assert not memory.waiting
    assert not memory.failures


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_error_in_the_middle_leaves_nothing_behind(place: str, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = prepare(config_of(model_dirs["qwen2"], {}), "none")
    wanted, memory = losses_and_gradients(model, batches, None), Noted()
    name = "swiglu_forward" if place == "forward" else "swiglu_backward"
    with monkeypatch.context() as patch:
        patch.setattr(import_module("structcot_kernels.mlp_block"), name, fails_on_call(3, name))
        with pytest.raises(ArithmeticError, match="on purpose"):
            losses_and_gradients(model, batches, memory)
    gc.collect()  # the traceback held the graph
    assert memory.slabs
    assert memory.all_is_given_back
    assert_same(losses_and_gradients(model, batches, memory), wanted)
    assert_same(losses_and_gradients(model, batches, None), wanted)


def test_host_memory_that_cannot_be_had_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r'parallel.cpu_offload: this machine cannot give .* GiB more .*use "none"'):
        host_empty(2**60, pinned=False)


def test_tensors_lie_one_behind_the_other_and_what_is_too_large_gets_a_slab_of_its_own() -> None:
    memory = Noted()
    shelf = Shelf(memory)
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in (((7,), torch.uint8), ((0, 4), torch.bfloat16), ((3, 5), torch.float32))]
    rooms = [shelf.empty_like(tensor) for tensor in tensors]
    assert [(room.shape, room.dtype) for room in rooms] == [(tensor.shape, tensor.dtype) for tensor in tensors]
    assert len(memory.slabs) == len({storage_of(room) for room in rooms}) == 1
    for number, room in enumerate(rooms):
        room.fill_(number)
    assert all(room.eq(number).all() for number, room in enumerate(rooms))
    shelf.empty_like(torch.empty(2**15 + 1))
    assert [slab.numel() for slab in memory.slabs] == [2**16, 2**18], "a power of two, so that the next one of about this size finds it"


def run_chain(memory: HostMemory, groups: list[Any], notes: list[list[Tensor]]) -> Tensor:
    """The end of a chain of nodes of which each keeps the tensors of a group, or what it makes when it is called."""
    out = torch.ones(2, requires_grad=True)
    with offloaded_activations(memory):
        for group in groups:
            out = Keep.apply(out, notes, *(group() if callable(group) else group))
    return out


def fails_on_call(call: int, name: str) -> Callable[..., Any]:
    plain, calls = getattr(import_module("structcot_kernels.mlp_block"), name), []

    def failing(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise ArithmeticError("on purpose")
        return plain(*arguments)

    return failing


def config_of(model_dir: Path, tuning: dict[str, Any]) -> Config:
    return tiny_config(model_dir, tuning=tuning, train={"batch_sequences": 6}, parallel={"max_tokens_per_microbatch": 96})


def prepare(config: Config, recompute: str, mesh: Any = None) -> tuple[Decoder, list[MicroBatch]]:
    """Build a model and the micro-batches of its first step, of several lengths."""
    model = build_model(Path(config.model_name_or_path), config, CPU, mesh)
    model.recompute = recompute
    fill_adapters(model)
    dropout_seed = 5 if config.tuning.lora_dropout else None
    return model, feed_of(random_samples([90, 57, 33, 60, 45, 71]), config, dropout_seed=dropout_seed).step_batches(0)


def losses_and_gradients(model: Decoder, batches: list[MicroBatch], memory: HostMemory | None) -> tuple[list[float], dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    model.host_memory, losses = memory, []
    for batch in batches:
        loss_sum, _ = model(batch)
        loss_sum.backward()
        losses.append(loss_sum.item())
    return losses, {
        name: whole_on_cpu(parameter.grad) for name, parameter in model.trained_parameters().items() if parameter.grad is not None
    }


def assert_same(got: tuple[list[float], dict[str, Tensor]], wanted: tuple[list[float], dict[str, Tensor]]) -> None:
    assert got[0] == wanted[0]
    assert got[1].keys() == wanted[1].keys()
    differing = [name for name in wanted[1] if not torch.equal(got[1][name], wanted[1][name])]
    assert not differing, differing


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What is freed inside is freed by reference counts alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
