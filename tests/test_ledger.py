"""The ledger knows what is alive, at most and of which kind, on real and on fake tensors; the tally knows what ranks send each other.

Whole steps are compared with PyTorch's allocator in tests/test_predict.py; here every rule of the ledger by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.profiler import ProfilerActivity, profile

from structcot.config import Config
from structcot.counting import Collective, Tally
from structcot.data.batch import MicroBatch, pack
from structcot.data.render import unmasked_sample
from structcot.flops import step_flops
from structcot.ledger import ACTIVATIONS, GATHERED, GRADIENTS, HOST, TEMPORARY, TRANSFER, Ledger
from structcot.model.decoder import Decoder
from structcot.model.weights import empty_model
from structcot.optim import clip_gradients, make_optimizer
from structcot.predict import WEIGHTS, fake_batch, fake_ranks, running
from structcot.step_time import launched_costs
from structcot_kernels.attention_varlen import attention_backward, attention_forward
from structcot_kernels.jit.linear_cross_entropy import tile_of
from structcot_kernels.launch import HOPPER, cdiv
from structcot_kernels.linear_cross_entropy import kernel_chunk, linear_cross_entropy_forward
from tests.test_predict import LENGTHS, TINY
from tests.tiny_models import tiny_config

KIB = 1024
RANKS = 8


def room(kib: int) -> Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def sizes(ledger: Ledger, *, peak: bool = False) -> dict[str, int]:
    """KiB by kind, without the kinds of which there is nothing."""
    return {kind: size // KIB for kind, size in (ledger.peak_bytes if peak else ledger.current_bytes).items() if size}


def allocated_peak(run: Callable[[], Any]) -> int:
    """Most bytes that PyTorch's allocator handed out inside `run` beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    total = peak = 0
    events: Any = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@contextmanager
def fake(num_ranks: int = 1, replicate: int = 1, *, triton: bool = True) -> Iterator[tuple[FakeTensorMode, Any]]:
    """Fake tensors and a mesh of ranks that are not there."""
    with ExitStack() as stack:
        mesh = stack.enter_context(fake_ranks(num_ranks, replicate)) if num_ranks > 1 else None
        stack.enter_context(running(triton))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True)), mesh


# What is alive


def test_a_storage_counts_once_from_its_operator_to_its_last_reference() -> None:
    with Ledger(gpu=False) as ledger:
        whole = room(8)
        view = whole[:1024].view(2, 512)
        whole.fill_(0)
        assert sizes(ledger) == {TEMPORARY: 8}
        other = room(4)
        assert sizes(ledger) == {TEMPORARY: 12}
        del whole, other
        assert sizes(ledger) == {TEMPORARY: 8}, "the view keeps it"
        del view
        assert sizes(ledger) == {}
        room(2)
    assert ledger.peak_total == 12 * KIB
    assert sizes(ledger, peak=True) == {TEMPORARY: 12}


def test_what_exists_before_counts_as_what_it_is_registered_as() -> None:
    weights, unknown = room(16), room(64)
    ledger = Ledger(gpu=False)
    ledger.register([weights, weights[:10]], WEIGHTS)
    with ledger:
        weights.add_(1)
        room(4)
    assert sizes(ledger, peak=True) == {WEIGHTS: 16, TEMPORARY: 4}, "a view is no second one"
    del unknown


def test_what_a_storage_turns_out_to_be_counts_at_a_peak_before_that_too() -> None:
    with Ledger(gpu=False) as ledger:
        kept, gradient = room(8), room(16)
        del_soon = room(2)
        del del_soon
        ledger.keep()
        ledger.register([gradient], GRADIENTS)
        del kept
        assert sizes(ledger) == {GRADIENTS: 16}
        assert sizes(ledger, peak=True) == {ACTIVATIONS: 8, GRADIENTS: 16, TEMPORARY: 2}
        later = room(64)
        ledger.keep()
    assert sizes(ledger, peak=True) == {GRADIENTS: 16, ACTIVATIONS: 64}, "a new peak knows nothing of the old one"
    del later


def test_a_storage_that_is_freed_and_refilled_in_place_is_followed() -> None:
    before = UntypedStorage.resize_
    ledger = Ledger(gpu=False)
    with ledger:
        gathered, small = room(32), room(1)
        gathered.untyped_storage().resize_(0)
        assert sizes(ledger) == {TEMPORARY: 1}
        with ledger:
            gathered.untyped_storage().resize_(16 * KIB)
        assert sizes(ledger) == {TEMPORARY: 17}
        ledger.register([gathered], GATHERED)
    assert ledger.peak_total == 33 * KIB
    assert sizes(ledger, peak=True) == {TEMPORARY: 33}, "at the peak it had another size"
    with pytest.raises(ArithmeticError), ledger:
        raise ArithmeticError
    assert UntypedStorage.resize_ is before
    del small


def test_host_memory_is_told_and_does_not_count() -> None:
    with Ledger(gpu=False) as ledger:
        with ledger.counting_as(HOST):
            copy = room(64)
        on_device = room(8)
        assert sizes(ledger) == {HOST: 64, TEMPORARY: 8}
        assert ledger.peak_total == 8 * KIB
        ledger.register([on_device], HOST)
        room(4)
    assert ledger.peak_total == 8 * KIB
    assert sizes(ledger) == {HOST: 72}
    assert sizes(ledger, peak=True)[TEMPORARY] == 8, "it moved after the peak"
    del copy


def test_tensors_on_another_device_than_the_one_that_is_meant_are_host_memory() -> None:
    with Ledger(gpu=False, device="meta") as ledger:
        here, there = torch.empty(8 * KIB, dtype=torch.uint8, device="meta"), room(4)
    assert sizes(ledger) == {TEMPORARY: 8, HOST: 4}
    del here, there


# What no dispatch mode can see

MANY = 1 << 20


@pytest.mark.parametrize(
    "run",
    [
        lambda narrow, wide, mask: wide.add_(narrow),
        lambda narrow, wide, mask: narrow.sub_(wide),
        lambda narrow, wide, mask: narrow * wide,
        lambda narrow, wide, mask: narrow.view(-1, 1024) / wide[: MANY // 1024].unsqueeze(1),
        lambda narrow, wide, mask: narrow * mask,
        lambda narrow, wide, mask: narrow * wide[0],
        lambda narrow, wide, mask: wide + wide,
        lambda narrow, wide, mask: wide.copy_(narrow),
        lambda narrow, wide, mask: narrow.masked_fill(mask, 0.0),
    ],
    ids=["wide += narrow", "narrow -= wide", "product", "by rows", "mask", "number", "one dtype", "copy", "fill"],
)
def test_copies_of_operands_of_another_dtype_are_those_of_the_allocator(run: Callable[..., Tensor]) -> None:
    operands = (torch.ones(MANY, dtype=torch.bfloat16), torch.ones(MANY), torch.ones(MANY, dtype=torch.bool))
    peaks, result = {}, operands[0]
    for gpu in (False, True):
        ledger = Ledger(gpu=gpu)
        ledger.register(operands, WEIGHTS)
        with ledger:
            result = run(*operands)
        peaks[gpu] = ledger.peak_total - sum(operand.nbytes for operand in operands)
    measured = allocated_peak(lambda: run(*operands))
    assert peaks[False] == pytest.approx(measured, abs=64)
    assert peaks[True] == (0 if any(result is operand for operand in operands) else result.nbytes), "a GPU copies nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 128)], ids=["shared", "own"])
@pytest.mark.parametrize("length", [100, 300, 900])
def test_what_attention_works_in_on_a_cpu_is_what_the_allocator_says(length: int, heads: tuple[int, ...], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, width = heads
    q_THd, k_TGd, v_TGd = (torch.randn(length, number, width, dtype=dtype) for number in (num_heads, num_kv_heads, num_kv_heads))
    packing = (torch.tensor([0, length], dtype=torch.int32), length, width**-0.5, "sdpa")

    def backward() -> None:
        attention_backward(q_THd, q_THd, k_TGd, v_TGd, *attended, *packing)

    attended = attention_forward(q_THd, k_TGd, v_TGd, *packing)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread has blocks of scores of its own
    try:
        measured = allocated_peak(backward)
    finally:
        torch.set_num_threads(threads)
    with Ledger(gpu=False) as ledger:
        backward()
    packed = 0 if dtype == torch.float32 else 0.24e6  # by kernels that depend on the CPU
    assert measured - packed <= 1.002 * ledger.peak_total
    assert ledger.peak_total <= 1.002 * measured


def test_the_block_of_logits_of_a_gpu_s_kernels_counts() -> None:
    rows, inner, columns = 8192, 64, 152064
    with fake():
        hidden_MD, weight_VD = (torch.empty(size, inner, dtype=torch.bfloat16) for size in (rows, columns))
        labels_M = torch.empty(rows, dtype=torch.int64)
        ledger = Ledger(gpu=True)
        ledger.register([hidden_MD, weight_VD, labels_M], WEIGHTS)
        with ledger:
            made = linear_cross_entropy_forward(hidden_MD, weight_VD, labels_M, True, False)
    chunk = kernel_chunk(columns, 2)
    block, partials = 2 * chunk * columns, 8 * chunk * cdiv(columns, tile_of(torch.bfloat16, chunk, HOPPER)["BLOCK_V"])
    assert 1.2e9 < block < 1.25e9
    given = sum(tensor.nbytes for tensor in made)
    assert ledger.peak_bytes[TEMPORARY] == pytest.approx(given + block + partials, rel=1e-4)
    assert ledger.current_bytes[TEMPORARY] == given


# Steps


def a_model(config: Config, mesh: Any = None) -> Decoder:
    model = empty_model(TINY, config, mesh, device="cpu")
    model.recompute, model.attention = "block", "sdpa"
    return model


def a_step(model: Decoder, batch: MicroBatch, config: Config, ledger: Ledger | None = None) -> None:
    optimizer = make_optimizer(model.trained_parameters(), config.train)
    loss_sum, _ = model(batch)
    if ledger is not None:
        ledger.keep()
    loss_sum.backward()
    if ledger is not None:
        ledger.register((parameter.grad for parameter in model.parameters() if parameter.grad is not None), GRADIENTS)
    del loss_sum
    clip_gradients(model.trained_parameters().values(), 1.0)
    optimizer.step(1e-4)


def plain_config(method: str, **parallel: Any) -> Config:
    return tiny_config(Path("nowhere"), tuning={"method": method, "lora_r": 16}, train={"dtype": "bfloat16"}, parallel=parallel)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_real_step_and_a_fake_one_are_the_same_to_the_ledger(method: str) -> None:
    config, seen = plain_config(method), {}
    real, ledger = a_model(config), Ledger(gpu=False)
    ledger.register(real.parameters(), WEIGHTS)
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.normal_(std=0.02)
    batch = pack([unmasked_sample(torch.zeros(length).numpy(), source="") for length in LENGTHS])
    with ledger:
        a_step(real, batch, config, ledger)
    seen["real"] = ledger
    with fake(triton=False) as (mode, _):
        model, ledger = a_model(config), Ledger(gpu=False)
        ledger.register(model.parameters(), WEIGHTS)
        with ledger:
            a_step(model, fake_batch(mode, LENGTHS, config), config, ledger)
        seen["fake"] = ledger
        for kind in (WEIGHTS, GRADIENTS, ACTIVATIONS, TEMPORARY):
            of_real, of_fake = (one.peak_bytes[kind] for one in seen.values())
            assert of_fake == pytest.approx(of_real, rel=0.005, abs=4 * KIB), kind
    for one in seen.values():
        assert sum(one.peak_bytes.values()) == one.peak_total


def test_of_a_sharded_tensor_the_part_of_this_rank_counts() -> None:
    with fake(RANKS) as (_, mesh):
        local = torch.ones(1024)
        sharded, ledger = DTensor.from_local(local, mesh, [Shard(0)]), Ledger(gpu=False)
        ledger.register([sharded], WEIGHTS)
        with ledger:
            twice = sharded * 2
        assert sharded.numel() == RANKS * 1024
        assert sizes(ledger) == {WEIGHTS: 4, TEMPORARY: 4}
        del twice


def test_fsdp_holds_shards_between_steps_and_gathers_and_reduces_what_it_must() -> None:
    config = plain_config("full")
    with fake(RANKS) as (mode, mesh):
        model, ledger = a_model(config, mesh), Ledger(gpu=True)
        ledger.register(model.parameters(), WEIGHTS)
        batch = fake_batch(mode, LENGTHS, config)
        num_weights = sum(parameter.numel() for parameter in model.parameters())
        with ledger:
            a_step(model, batch, config, ledger)
        peak, now = ledger.peak_bytes, ledger.current_bytes
        assert peak[WEIGHTS] == now[WEIGHTS] == pytest.approx(4 * num_weights / RANKS, rel=0.02)
        assert now[GRADIENTS] == pytest.approx(now[WEIGHTS], rel=0.02)
        assert now[GATHERED] == 0, "everything that was gathered is freed again"
        assert min(peak[kind] for kind in (GATHERED, GRADIENTS, TRANSFER, ACTIVATIONS)) > 0
        assert sum(peak.values()) == ledger.peak_total


def test_gradients_before_they_are_reduced_are_gradients() -> None:
    with fake(RANKS) as (_, mesh):
        model, ledger = nn.Linear(512, 512, bias=False), Ledger(gpu=True)
        fully_shard(model, mesh=mesh)
        ledger.register(model.parameters(), WEIGHTS)
        x = torch.ones(1, 512)
        with ledger:
            model(x).sum().backward()
    unsharded = 512 * 512 * 4 // KIB
    peak = sizes(ledger, peak=True)
    assert peak[GRADIENTS] == unsharded + unsharded // RANKS, "what goes into the reduction and what comes out"
    assert peak[TRANSFER] == unsharded
    assert peak[WEIGHTS] == unsharded // RANKS


# What ranks send


def tally_of(method: str, num_ranks: int, replicate: int) -> tuple[Tally, int, int, int]:
    """A step's tally, and bytes of what is frozen, trained by adapters or in full, and kept in fp32 beside."""
    config = plain_config(method, replicate=replicate)
    with fake(num_ranks, replicate) as (mode, mesh):
        model = a_model(config, mesh)
        batch = fake_batch(mode, LENGTHS, config)
        with Tally(lambda *_: "step") as tally:
            a_step(model, batch, config)
        frozen = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.bfloat16)
        trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
        rest = sum(parameter.numel() for parameter in model.parameters()) - frozen - trained
    return tally, 2 * frozen, 4 * trained, 4 * rest


@pytest.mark.parametrize("replicate", [1, 2])
def test_collectives_are_those_of_fsdp_with_their_bytes_and_ranks(replicate: int) -> None:
    tally, frozen, trained, rest = tally_of("lora", RANKS, replicate)
    shards = RANKS // replicate
    moved: dict[str, int] = {}
    for collective in tally.collectives:
        assert collective.group_size == (replicate if collective.kind == "all-reduce" else shards)
        moved[collective.kind] = moved.get(collective.kind, 0) + collective.bytes
    head = 2 * TINY.vocab_size * TINY.hidden_size  # tied, and kept from forward to backward
    assert moved["all-gather"] == pytest.approx(2 * (frozen + trained + rest) - head, rel=0.02)
    assert moved["reduce-scatter"] == pytest.approx(trained, rel=0.02)
    assert moved.get("all-reduce", 0) == pytest.approx(trained / shards if replicate > 1 else 0, rel=0.02)


def test_an_exchange_of_heads_is_an_all_to_all_and_an_unknown_collective_is_refused() -> None:
    with fake(RANKS):
        sent, given = torch.ones(RANKS, 4), torch.empty(RANKS, 4)
        with Tally(lambda *_: "any") as tally:
            dist.all_to_all_single(given, sent)
        assert tally.collectives == [Collective("all-to-all", RANKS * 4 * 4, RANKS)]
        assert tally.kernels == []
        with pytest.raises(ValueError, match=r"c10d.broadcast_.*is no collective that is known"), Tally(lambda *_: "any"):
            dist.broadcast(sent, 0)


def test_fsdp_s_operators_copy_and_a_sharded_tensor_costs_this_rank_its_part() -> None:
    with fake(RANKS) as (_, mesh):
        model = nn.Linear(512, 512, bias=False)
        fully_shard(model, mesh=mesh)
        x, whole = torch.ones(1, 512), 512 * 512 * 4
        with Tally(lambda *_: "any") as tally:
            model(x).sum().backward()
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.ones(()))
    moved = {kernel.operator.split(".")[1]: kernel.cost.bytes for kernel in tally.kernels}
    assert moved["all_gather_copy_in"] == 2 * whole // RANKS
    assert moved["split_with_sizes_copy"] == 2 * whole
    assert moved["chunk_cat"] == 2 * whole
    scaled = next(size for name, size in moved.items() if name.startswith("_foreach_mul"))
    assert scaled == pytest.approx(2 * whole // RANKS, abs=8)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("num_ranks", [1, RANKS])
def test_operations_on_fake_tensors_are_those_on_meta_and_those_of_a_hand_count(num_ranks: int, method: str) -> None:
    config, lengths = plain_config(method), [512] * 4
    with fake(num_ranks) as (mode, mesh):
        model = a_model(config, mesh)
        batch = fake_batch(mode, lengths, config)
        with Tally(lambda *_: "step") as tally:
            model(batch)[0].backward()
    counted = sum(kernel.cost.flops for kernel in tally.kernels)
    on_meta = launched_costs(TINY, config, "block", lengths)
    by_hand = step_flops(TINY, lengths, sum(lengths), config.tuning, "block").hardware
    assert counted == pytest.approx(by_hand, rel=0.01)
    assert counted == pytest.approx(sum(cost.flops for cost in on_meta), rel=0 if num_ranks == 1 else 1e-3)
    if num_ranks == 1:
        assert [kernel.cost for kernel in tally.kernels] == on_meta
