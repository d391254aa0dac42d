"""Attention: as exact as PyTorch, blind to other documents, never run twice, and each library called as it wants to be."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from structcot_kernels import _attention_backends as backends
from structcot_kernels import attention_varlen, reference
from structcot_kernels._cost import COSTS, size_bytes
from structcot_kernels.attention_varlen import (
    FORWARDS,
    LIBRARIES,
    attention_backward,
    attention_forward,
    choose_attention,
    describe_attention,
    find_obstacle,
)
from tests.kernels.attention_libraries import Libraries, stand_ins
from tests.kernels.parity import DTYPES, assert_parity, random

MODULE = importlib.import_module("structcot_kernels.attention_varlen")
NAMES = ["out", "grad q", "grad k", "grad v"]
LENGTHS = (1, 37, 0, 30)


def borders(*lengths: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def heads(num_tokens: int, num_groups: int, repeats: int, width: int, **options) -> list[Tensor]:
    """q, k and v."""
    return [random(num_tokens, count * num_groups, width, seed=seed, **options) for seed, count in enumerate((repeats, 1, 1))]


def over(lengths: tuple[int, ...], width: int, function: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
    """`function` of q, k and v, for documents of `lengths`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, borders(*lengths, device=q.device), max(lengths), width**-0.5, **options)

    return attend


@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["usual", "peaked"])
@pytest.mark.parametrize("width", [12, 16, 64, 128])
@pytest.mark.parametrize(("num_groups", "repeats"), [(2, 1), (3, 2), (1, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_and_its_gradients_are_as_exact_as_pytorch(dtype, num_groups, repeats, width, scale, device) -> None:
    tensors = heads(sum(LENGTHS), num_groups, repeats, width, dtype=dtype, scale=scale, device=device)
    ours = over(LENGTHS, width, attention_varlen, implementation="sdpa")
    assert_parity(ours, over(LENGTHS, width, reference.attention_varlen), tensors, NAMES)


@pytest.mark.parametrize("rows_at_a_time", [0, 7, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_computation_of_gpus_is_as_exact_as_pytorch(dtype, rows_at_a_time, monkeypatch) -> None:
    monkeypatch.setattr(backends, "MAX_SCORES", rows_at_a_time * 6 * 37)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            views = [backends.grouped(tensor, 2) for tensor in (q, k, v)]
            out, lse = backends.plain_forward(*views, 0.25)
            ctx.save_for_backward(*views, out, lse)
            return out.permute(2, 0, 1, 3).flatten(1, 2)

        @staticmethod
        def backward(ctx, grad):
            gradients = backends.plain_backward(backends.grouped(grad, 2), *ctx.saved_tensors, 0.25)
            return tuple(gradient.permute(2, 0, 1, 3).flatten(1, 2).to(grad.dtype) for gradient in gradients)

    assert_parity(Plain.apply, over((37,), 16, reference.attention_varlen), heads(37, 2, 3, 16, dtype=dtype), NAMES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_do_not_see_one_another(dtype, device) -> None:
    tensors = heads(20, 2, 2, 16, dtype=dtype, device=device)
    alone = [tensor.detach()[5:13].clone().requires_grad_() for tensor in tensors]
    other = [torch.cat((tensor[:5] + 1, tensor[5:13], tensor[13:] * 3)).detach().requires_grad_() for tensor in tensors]
    results = []
    for operands, lengths, rows in (
        (tensors, (5, 8, 7), slice(5, 13)),
        (other, (5, 8, 7), slice(5, 13)),
        (alone, (8,), slice(None)),
    ):
        out = over(lengths, 16, attention_varlen, implementation="sdpa")(*operands)
        gradients = torch.autograd.grad(out[rows].square().sum(), operands)
        results.append([out[rows], *(gradient[rows] for gradient in gradients)])
    for name, packed, among_others, single in zip(NAMES, *results, strict=True):
        assert torch.equal(packed, among_others), name
        assert torch.equal(packed, single), name


def test_heads_that_lie_in_a_wider_matrix_give_the_same(device) -> None:
    qkv_TN = random(20, 8 * 16, dtype=torch.float32, device=device, trained=False)
    views = [part.unflatten(1, (-1, 16)) for part in qkv_TN.split((64, 32, 32), dim=1)]
    plain = [view.contiguous() for view in views]
    assert torch.equal(over((9, 11), 16, attention_varlen)(*views), over((9, 11), 16, attention_varlen)(*plain))
    arguments = (borders(9, 11, device=device), 11, 0.25, "sdpa")
    out, lse = attention_forward(*views, *arguments)
    for strided, contiguous in zip(
        attention_backward(out, *views, out, lse, *arguments), attention_backward(out, *plain, out, lse, *arguments), strict=True
    ):
        assert torch.equal(strided, contiguous)
        assert strided.is_contiguous()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_no_tokens_give_none(lengths, device) -> None:
    tensors = heads(0, 2, 2, 16, dtype=torch.float32, device=device)
    out = attention_varlen(*tensors, borders(*lengths, device=device), 0, 1.0)
    assert out.shape == (0, 4, 16)
    out.sum().backward()
    assert [tensor.grad.shape for tensor in tensors] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]


def test_backward_runs_no_forward(device) -> None:
    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.counts[operator.name()] += 1
            return operator(*args, **(kwargs or {}))

    with Calls() as calls:
        over(LENGTHS, 16, attention_varlen)(*heads(sum(LENGTHS), 2, 2, 16, dtype=torch.float32, device=device)).sum().backward()
    attention = {name: count for name, count in calls.counts.items() if "attention" in name}
    assert attention == {"structcot::attention_forward": 1, "structcot::attention_backward": 1}


def test_cost_is_that_of_the_causal_half(device) -> None:
    q, k, v = heads(24, 2, 2, 16, dtype=torch.bfloat16, device=device)
    cu_seqlens = borders(8, 8, 8, device=device)
    with FlopCounterMode(display=False) as flops:
        attention_varlen(q, k, v, cu_seqlens, 8, 1.0).sum().backward()
    # q k^T and p v, 2 L L d operations each in each of 3 documents and 4 heads, and the half of it; 2.5 times that backward.
    forward = 0.5 * 2 * (2 * 8 * 8 * 16) * 3 * 4
    assert flops.get_total_flops() == 3.5 * forward
    out, lse = attention_forward(q, k, v, cu_seqlens, 8, 1.0, "sdpa")
    (cost,) = COSTS[attention_forward._opoverload](q, k, v, cu_seqlens, 8, 1.0, "sdpa")
    assert (cost.flops, cost.bytes) == (forward, size_bytes(q, k, v, cu_seqlens, out, lse))
    (cost,) = COSTS[attention_backward._opoverload](out, q, k, v, out, lse, cu_seqlens, 8, 1.0, "sdpa")
    assert (cost.flops, cost.bytes) == (2.5 * forward, size_bytes(out, q, k, v, out, lse, cu_seqlens) + size_bytes(q, k, v))


def test_operators_are_registered_soundly(device) -> None:
    tensors = heads(12, 2, 2, 16, dtype=torch.float32, device=device)
    arguments = (borders(5, 7, device=device), 7, 0.25, "sdpa")
    torch.library.opcheck(attention_forward, (*tensors, *arguments))
    frozen = [tensor.detach() for tensor in tensors]
    out, lse = attention_forward(*frozen, *arguments)
    torch.library.opcheck(attention_backward, (out, *frozen, out, lse, *arguments))


def test_torch_compile_sees_one_node(device, monkeypatch) -> None:
    def look_for_packages(*_) -> None:
        """What cannot be traced is not: the choice is made once, while compiling."""
        torch._dynamo.graph_break()

    monkeypatch.setattr(MODULE, "find_obstacle", lambda name, *_: look_for_packages() if name == "sdpa" else "not here")
    tensors = heads(12, 2, 2, 16, dtype=torch.float32, device=device)
    attend = over((5, 7), 16, attention_varlen)
    compiled = torch.compile(
        lambda *heads: attention_varlen(*heads, borders(5, 7, device=device), 7, 0.25), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*tensors), attend(*tensors))


def test_the_log_sum_exp_carries_no_gradient(device) -> None:
    tensors = heads(6, 2, 2, 16, dtype=torch.float32, device=device)
    out, lse = attention_forward(*tensors, borders(6, device=device), 6, 0.25, "sdpa")
    assert out.requires_grad
    assert not lse.requires_grad


# What is refused


def bent(**changes) -> dict:
    """Arguments of which some are wrong."""
    q, k, v = heads(6, 2, 2, 16, dtype=torch.float32, trained=False)
    return {"q_THd": q, "k_TGd": k, "v_TGd": v, "cu_seqlens_S1": borders(2, 4), "max_seqlen": 4, "scale": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q_THd": torch.ones(6, 64)}, ValueError, r"q_THd has shape \(6, 64\)"),
        ({"q_THd": torch.ones(6, 3, 16)}, ValueError, "3 query heads cannot share 2 key-value heads"),
        ({"k_TGd": torch.ones(6, 0, 16), "v_TGd": torch.ones(6, 0, 16)}, ValueError, "cannot share 0 key-value heads"),
        ({"k_TGd": torch.ones(6, 2, 8)}, ValueError, r"k_TGd has shape \(6, 2, 8\); it must be \(6, any, 16\)"),
        ({"v_TGd": torch.ones(6, 1, 16)}, ValueError, r"v_TGd has shape \(6, 1, 16\); it must be \(6, 2, 16\)"),
        ({"v_TGd": torch.ones(6, 2, 32)[..., ::2]}, ValueError, "v_TGd has strides"),
        ({"k_TGd": torch.ones(6, 2, 16).bfloat16()}, TypeError, "k_TGd is torch.bfloat16; it must be torch.float32"),
        ({"q_THd": torch.ones(6, 4, 16).double()}, TypeError, "got torch.float64"),
        ({"cu_seqlens_S1": borders(2, 4).long()}, TypeError, "cu_seqlens_S1 is a Tensor of torch.int64 on cpu"),
        ({"cu_seqlens_S1": borders(2, 4).to("meta")}, TypeError, "of torch.int32 on meta; it must be a Tensor of torch.int32 on cpu"),
        ({"cu_seqlens_S1": borders(2, 4)[None]}, ValueError, r"cu_seqlens_S1 has shape \(1, 3\)"),
        ({"cu_seqlens_S1": borders(2, 3)}, ValueError, r"cu_seqlens_S1 is \[0, 2, 5\]; it must rise from 0 to the 6 tokens"),
        ({"cu_seqlens_S1": borders(1, 5)[1:]}, ValueError, r"cu_seqlens_S1 is \[1, 6\]"),
        ({"cu_seqlens_S1": borders(4, -2, 4)}, ValueError, r"cu_seqlens_S1 is \[0, 4, 2, 6\]"),
        ({"cu_seqlens_S1": borders(2, 4)[:0]}, ValueError, r"cu_seqlens_S1 is \[\]"),
        ({"max_seqlen": 3}, ValueError, "max_seqlen is 3, and a document has 4 tokens"),
        ({"implementation": "flash"}, ValueError, 'got implementation "flash"; use one of auto, flash_attention_4, .*, sdpa'),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes, error, words) -> None:
    with pytest.raises(error, match=words):
        attention_varlen(**bent(**changes))


def test_sharded_tensors_are_refused() -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    try:
        for name in ("q_THd", "v_TGd", "cu_seqlens_S1"):
            sharded = DTensor.from_local(bent()[name], mesh)
            with pytest.raises(TypeError, match=rf"{name} is a DTensor|got a DTensor"):
                attention_varlen(**bent(**{name: sharded}))
    finally:
        destroy_process_group()


def test_operators_want_a_name_that_was_chosen() -> None:
    q, k, v = heads(6, 2, 2, 16, dtype=torch.float32, trained=False)
    with pytest.raises(ValueError, match='attention_forward: got implementation "auto"; give what choose_attention returned'):
        attention_forward(q, k, v, borders(6), 6, 1.0, "auto")
    out, lse = attention_forward(q, k, v, borders(6), 6, 1.0, "sdpa")
    with pytest.raises(ValueError, match=r"lse_HT has shape \(4, 5\); it must be \(4, 6\)"):
        attention_backward(out, q, k, v, out, lse[:, 1:], borders(6), 6, 1.0, "sdpa")
    for grad, error, words in (
        (out[1:], ValueError, "grad_THd has shape"),
        (out.bfloat16(), TypeError, "grad_THd is torch.bfloat16; it must be torch.float32"),
        (out.repeat(1, 1, 2)[..., ::2], ValueError, "grad_THd has strides"),
    ):
        with pytest.raises(error, match=words):
            attention_backward(grad, q, k, v, out, lse, borders(6), 6, 1.0, "sdpa")


# Which library


INSTALLED = {"flash-attn-4": "4.0.0b36", "flash-attn-3": "3.0.0", "flash-attn": "2.8.3", "torch": "2.13.0"}
GPU = torch.device("cuda")


@pytest.fixture
def libraries() -> Iterator[Libraries]:
    with stand_ins() as present:
        yield present


@pytest.fixture
def machine(monkeypatch, libraries) -> Iterator[Callable[..., None]]:
    """A machine with a GPU of some capability, and packages of some versions."""

    def make(capability: tuple[int, int] = (9, 0), **changes: str | None) -> None:
        versions = INSTALLED | {name.replace("_", "-"): version for name, version in changes.items()}
        installed = {name: TorchVersion(version) for name, version in versions.items() if version}
        monkeypatch.setattr(MODULE, "installed_version", installed.get)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        find_obstacle.cache_clear()

    yield make
    find_obstacle.cache_clear()


@pytest.mark.parametrize(
    ("capability", "missing", "dtype", "width", "chosen"),
    [
        ((9, 0), {}, torch.bfloat16, 128, "flash_attention_4"),
        ((10, 0), {}, torch.float16, 64, "flash_attention_4"),
        ((10, 0), {}, torch.bfloat16, 192, "flash_attention_2"),
        ((10, 0), {}, torch.bfloat16, 256, "flash_attention_4"),
        ((9, 0), {"flash_attn_4": None}, torch.bfloat16, 128, "flash_attention_3"),
        ((9, 0), {"flash_attn_4": "4.0.0b20"}, torch.bfloat16, 128, "flash_attention_3"),
        ((9, 0), {"flash_attn_4": None, "flash_attn_3": "3.0.0.b1"}, torch.bfloat16, 128, "flash_attention_2"),
        ((8, 0), {}, torch.bfloat16, 128, "flash_attention_2"),
        ((8, 0), {"flash_attn": "2.6.3"}, torch.bfloat16, 128, "varlen"),
        ((12, 0), {"flash_attn": None}, torch.bfloat16, 256, "varlen"),
        ((9, 0), {}, torch.bfloat16, 100, "sdpa"),
        ((9, 0), {}, torch.bfloat16, 264, "sdpa"),
        ((9, 0), {}, torch.float32, 128, "sdpa"),
        ((7, 5), {}, torch.float16, 128, "sdpa"),
    ],
)
def test_auto_takes_the_first_that_can(capability, missing, dtype, width, chosen, machine) -> None:
    machine(capability, **missing)
    assert choose_attention("auto", GPU, dtype, width) == chosen


def test_on_a_cpu_it_is_sdpa_and_on_no_device_any() -> None:
    assert choose_attention("auto", torch.device("cpu"), torch.bfloat16, 64) == "sdpa"
    assert choose_attention("auto", torch.device("meta"), torch.bfloat16, 64) == "sdpa"
    assert choose_attention("flash_attention_3", torch.device("meta"), torch.bfloat16, 64) == "flash_attention_3"


@pytest.mark.parametrize(
    ("name", "capability", "changes", "dtype", "width", "words"),
    [
        ("flash_attention_4", (8, 0), {}, torch.bfloat16, 128, r"it runs on compute capability 9.x, 10.x, and cuda has 8.0"),
        ("flash_attention_3", (10, 0), {}, torch.bfloat16, 128, r"compute capability 9.x, and cuda has 10.0"),
        ("flash_attention_2", (9, 0), {}, torch.float32, 128, r"bfloat16 or float16, not in torch.float32; .* is \"sdpa\" here"),
        ("varlen", (9, 0), {}, torch.bfloat16, 100, r"multiples of 8 up to 256, not 100"),
        ("flash_attention_4", (10, 0), {}, torch.bfloat16, 136, r"multiples of 8 up to 128, not 136"),
        ("flash_attention_4", (9, 0), {"flash_attn_4": None}, torch.bfloat16, 128, r"flash-attn-4 is not installed \(pip install --pre"),
        ("flash_attention_3", (9, 0), {"flash_attn_3": None}, torch.bfloat16, 128, r"flash-attn-3 is not installed \(build hopper/"),
        ("flash_attention_2", (9, 0), {"flash_attn": None}, torch.bfloat16, 128, r"flash-attn is not installed \(pip install --up"),
        ("flash_attention_2", (9, 0), {"flash_attn": "2.6.3"}, torch.bfloat16, 128, r"flash-attn 2.6.3 is too old; it must be 2.7.0"),
        ("varlen", (9, 0), {"torch": "2.9.1"}, torch.bfloat16, 128, r"torch 2.9.1 is too old; it must be 2.11.0 or newer"),
    ],
)
def test_a_named_one_that_cannot_run_is_an_error_that_helps(name, capability, changes, dtype, width, words, machine) -> None:
    machine(capability, **changes)
    with pytest.raises(RuntimeError, match=rf'"{name}" was asked for and cannot run: .*{words}'):
        choose_attention(name, GPU, dtype, width)


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_for_gpus_are_refused_on_a_cpu(name) -> None:
    tensors = heads(6, 2, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f'"{name}" was asked for and cannot run: it needs a GPU, and the tensors lie on cpu; .*"sdpa"'):
        attention_varlen(*tensors, borders(6), 6, 1.0, name)


def test_a_library_that_is_broken_is_named_with_its_error(machine, monkeypatch) -> None:
    machine()

    def broken(name: str):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(MODULE, "import_module", broken)
    with pytest.raises(RuntimeError, match=r"flash-attn 2.8.3 is installed but cannot be imported: undefined symbol: _ZN3c10"):
        choose_attention("flash_attention_2", GPU, torch.bfloat16, 128)


def test_what_was_chosen_can_be_printed(machine) -> None:
    sentence = functools.partial(describe_attention, device=GPU, dtype=torch.bfloat16, head_dim=128)
    machine()
    assert sentence("auto") == "attention: flash_attention_4 (flash-attn-4 4.0.0b36)"
    assert sentence("varlen") == "attention: varlen (torch 2.13.0)"
    machine(flash_attn_4=None, flash_attn_3="3.0.0b1")
    assert sentence("auto") == (
        "attention: flash_attention_2 (flash-attn 2.8.3);"
        " no flash_attention_4: the package flash-attn-4 is not installed (pip install --pre --upgrade flash-attn-4);"
        " no flash_attention_3: flash-attn-3 3.0.0b1 is too old; it must be 3.0.0 or newer"
        " (build hopper/ of github.com/Dao-AILab/flash-attention)"
    )
    on_cpu = describe_attention("auto", torch.device("cpu"), torch.float32, 64)
    assert on_cpu == "attention: sdpa (torch 2.13.0)"


# How each library is called


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 0, 1)], ids=str)
def test_each_library_is_called_as_its_release_wants(name, lengths, libraries: Libraries) -> None:
    def attend(*operands, implementation: str = name) -> Tensor:
        return attention_forward(*operands, implementation)[0]

    tensors = heads(sum(lengths), 2, 3, 16, dtype=torch.bfloat16)
    assert_parity(over(lengths, 16, attend), over(lengths, 16, reference.attention_varlen), tensors, NAMES)
    assert len(libraries.calls) == (0 if name == "varlen" else 2)


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_library_is_called_for_no_tokens(name) -> None:
    with stand_ins() as libraries:
        out, _ = attention_forward(*heads(0, 2, 2, 16, dtype=torch.bfloat16), borders(0), 0, 1.0, name)
        out.sum().backward()
    assert libraries.calls == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_results_are_contiguous_whatever_a_library_returns(name, libraries: Libraries) -> None:
    q, k, v = (random(count, 6, 16, dtype=torch.bfloat16, seed=count).transpose(0, 1).detach() for count in (4, 2, 2))
    arguments = (borders(6), 6, 0.25, name)
    out, lse = attention_forward(q, k, v, *arguments)
    for result in (out, lse, *attention_backward(out, q, k, v, out, lse, *arguments)):
        assert result.is_contiguous()


@pytest.mark.parametrize("name", ["flash_attention_4", "flash_attention_3", "flash_attention_2"])
def test_deterministic_gradients_are_asked_for_as_torch_is_told(name, libraries: Libraries) -> None:
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            attention_forward(*heads(6, 2, 2, 16, dtype=torch.bfloat16), borders(6), 6, 1.0, name)[0].sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert libraries.deterministic == [False, True]


# On a GPU


def usable(name: str, dtype: torch.dtype, width: int) -> str:
    """`name`, unless it cannot run here: then the test is skipped."""
    obstacle = find_obstacle(name, GPU, dtype, width)
    if obstacle:
        pytest.skip(obstacle)
    return name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORWARDS)
def test_libraries_are_as_exact_as_pytorch_on_a_gpu(name, dtype) -> None:
    for width, lengths in itertools.product((64, 128), ((1, 300, 0, 129), (1, 1, 0, 1))):
        tensors = heads(sum(lengths), 2, 5, width, dtype=dtype, device="cuda")
        ours = over(lengths, width, attention_varlen, implementation=usable(name, dtype, width))
        assert_parity(ours, over(lengths, width, reference.attention_varlen), tensors, NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LIBRARIES)
def test_documents_do_not_see_one_another_on_a_gpu(name) -> None:
    tensors = heads(300, 2, 5, 64, dtype=torch.bfloat16, trained=False, device="cuda")
    other = [torch.cat((tensor[:70] + 1, tensor[70:200], tensor[200:] * 3)) for tensor in tensors]
    attend = over((70, 130, 100), 64, attention_varlen, implementation=usable(name, torch.bfloat16, 64))
    assert torch.equal(attend(*tensors)[70:200], attend(*other)[70:200])
