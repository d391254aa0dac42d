"""SwiGLU with low-rank products inside: as exact as PyTorch, gradients by hand against autograd, every byte accounted for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structcot_kernels._cost import COSTS
from structcot_kernels.jit import swiglu_low_rank as jit
from structcot_kernels.swiglu_low_rank import MAX_RANK, swiglu_low_rank_backward, swiglu_low_rank_forward
from tests.kernels.parity import DTYPES, FLOORS, assert_as_exact, random

SHAPES = [(1, 1, 1), (7, 63, 3), (140, 96, 16), (65, 130, 40), (33, 64, MAX_RANK)]
"""T, F, R."""
SCALE = 1.7
TILE = jit.backward_tile(16, 90)
NAMES = ("grad gate", "grad up", "grad B", "grad A")


def tensors(shape: tuple[int, int, int], dtype: torch.dtype, device, spread: float = 1.0) -> dict[str, Tensor]:
    num_rows, width, rank = shape
    sizes = {
        "grad_act": (num_rows, width),
        "gate": (num_rows, width),
        "up": (num_rows, width),
        "s": (num_rows, 2 * rank),
        "b_gate": (width, rank),
        "b_up": (width, rank),
        "ds_down": (num_rows, rank),
        "a_down": (rank, width),
    }
    return {
        name: random(*size, dtype=dtype, seed=seed, scale=spread if name == "gate" else 0.5, trained=False, device=device)
        for seed, (name, size) in enumerate(sizes.items())
    }


def plain(given: dict[str, Tensor]) -> list[Tensor]:
    """Activation, S of down, and all gradients by autograd, for ds_down as the gradient of S of down."""
    trained = {name: given[name].clone().requires_grad_() for name in ("gate", "up", "b_gate", "b_up", "a_down")}
    s_gate, s_up = given["s"].chunk(2, dim=1)
    gate = trained["gate"] + SCALE * (s_gate @ trained["b_gate"].T)
    act = F.silu(gate) * (trained["up"] + SCALE * (s_up @ trained["b_up"].T))
    s_down = act @ trained["a_down"].T
    grads = torch.autograd.grad((act, s_down), list(trained.values()), (given["grad_act"], given["ds_down"]))
    return [act.detach(), s_down.detach(), grads[0], grads[1], torch.stack(grads[2:4]), grads[4]]


def ours(given: dict[str, Tensor]) -> list[Tensor]:
    low_rank = (given["s"], given["b_gate"], given["b_up"], SCALE)
    forward = swiglu_low_rank_forward(given["gate"], given["up"], *low_rank, given["a_down"])
    return [
        *forward,
        *swiglu_low_rank_backward(given["grad_act"], given["gate"], given["up"], *low_rank, given["ds_down"], given["a_down"]),
    ]


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["usual", "peaked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_as_exact_as_pytorch(
    dtype: torch.dtype, shape: tuple[int, int, int], spread: float, device, backend
) -> None:
    given = tensors(shape, dtype, device, spread)
    truth = plain({name: tensor.double() for name, tensor in given.items()})
    for name, got, other, exact in zip(("act", "S", *NAMES), ours(given), plain(given), truth, strict=True):
        assert_as_exact(got, other, exact, FLOORS[dtype], name)
        assert got.dtype == (torch.float32 if name in ("grad B", "grad A") else dtype)


def test_two_runs_give_the_same_bits_and_chunks_add_up(device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors((200, 64, 16), torch.bfloat16, device)
    assert jit.chunks_of(200, 64, TILE) == 7
    many = ours(given)
    assert all(torch.equal(one, other) for one, other in zip(many, ours(given), strict=True))
    monkeypatch.setattr("structcot_kernels.launch.MIN_PROGRAMS", 1)
    assert jit.chunks_of(200, 64, TILE) == 1
    for one, other in zip(many, ours(given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1, 32, 33, 1000, 16384])
@pytest.mark.parametrize("width", [1, 1536, 27648])
def test_no_chunk_is_empty_and_none_is_missing(num_rows: int, width: int) -> None:
    block = TILE["BLOCK_T"]
    num_chunks, num_blocks = jit.chunks_of(num_rows, width, TILE), max(1, -(-num_rows // block))
    rows_at_once = -(-num_blocks // num_chunks) * block  # as the kernel does
    assert (num_chunks - 1) * rows_at_once < max(1, num_rows) <= num_chunks * rows_at_once


def test_no_rows_give_none(device, backend: str) -> None:
    results = ours(tensors((0, 20, 4), torch.float32, device))
    assert [tuple(result.shape) for result in results] == [(0, 20), (0, 4), (0, 20), (0, 20), (2, 20, 4), (4, 20)]
    assert not results[4].any()
    assert not results[5].any()


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device) -> None:
    last = tensors((64, 27648, 16), torch.bfloat16, device)
    num_rows = 2**31 // 27648 + 200
    given = {name: F.pad(tensor, (0, 0, num_rows - 64, 0)) if len(tensor) == 64 else tensor for name, tensor in last.items()}
    for name, got, wanted in zip(("act", "S", *NAMES), ours(given), ours(last), strict=True):
        is_sum = name in ("grad B", "grad A")  # to which rows of zeros add nothing, in another order
        rows, rtol = (got, 1e-5) if is_sum else (got[-64:], 2**-7)
        torch.testing.assert_close(rows, wanted, rtol=rtol, atol=1e-5, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.parametrize("shape", [(140, 96, 16), (65, 130, 40)], ids=str)
def test_bytes_moved_are_those_of_the_formula(shape: tuple[int, int, int], traffic) -> None:
    given = tensors(shape, torch.bfloat16, "cpu")
    low_rank = (given["s"], given["b_gate"], given["b_up"], SCALE)
    for operator, arguments in (
        (swiglu_low_rank_forward, (given["gate"], given["up"], *low_rank, given["a_down"])),
        (swiglu_low_rank_backward, (given["grad_act"], given["gate"], given["up"], *low_rank, given["ds_down"], given["a_down"])),
    ):
        kernel, *_ = COSTS[operator._opoverload](*arguments)
        with traffic() as counted:
            operator(*arguments)
        assert counted.loaded + counted.stored == kernel.bytes + kernel.cached_bytes, operator


def test_the_adapters_move_nothing_of_the_mlps_width() -> None:
    rows, width, rank = 16384, 27648, 64
    meta = {
        name: torch.empty(size, dtype=torch.bfloat16, device="meta")
        for name, size in (
            ("TF", (rows, width)),
            ("T2R", (rows, 2 * rank)),
            ("FR", (width, rank)),
            ("TR", (rows, rank)),
            ("RF", (rank, width)),
        )
    }
    (cost,) = COSTS[swiglu_low_rank_backward._opoverload](
        meta["TF"], meta["TF"], meta["TF"], meta["T2R"], meta["FR"], meta["FR"], 2.0, meta["TR"], meta["RF"]
    )
    assert cost.bytes <= 1.01 * 5 * 2 * rows * width


def test_operators_are_registered_soundly(device) -> None:
    given = tensors((5, 20, 4), torch.float32, device)
    low_rank = (given["s"], given["b_gate"], given["b_up"], SCALE)
    torch.library.opcheck(swiglu_low_rank_forward, (given["gate"], given["up"], *low_rank, given["a_down"]))
    torch.library.opcheck(
        swiglu_low_rank_backward, (given["grad_act"], given["gate"], given["up"], *low_rank, given["ds_down"], given["a_down"])
    )


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("up", lambda up: up[:, :19].contiguous(), ValueError, r"up_TF has shape \(5, 19\); it must be \(5, 20\)"),
        ("s", lambda s: s[:, :7].contiguous(), ValueError, r"s_T2R has shape \(5, 7\); it must be \(5, 8\)"),
        ("b_gate", lambda b: b.T.contiguous(), ValueError, r"b_gate_FR has shape \(4, 20\); it must be \(20, 4\)"),
        ("b_up", lambda b: b.T.contiguous().T, ValueError, r"b_up_FR has strides \(1, 20\); call contiguous\(\) first"),
        ("a_down", lambda a: a.repeat(20, 1), ValueError, "a_down_RF has rank 80; the kernels hold ranks from 1 to 64"),
        ("a_down", lambda a: a.bfloat16(), TypeError, r"a_down_RF is torch.bfloat16; it must be torch.float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(name: str, change, error, words: str, device) -> None:
    given = tensors((5, 20, 4), torch.float32, device)
    with pytest.raises(error, match=words):
        ours({**given, name: change(given[name])})
