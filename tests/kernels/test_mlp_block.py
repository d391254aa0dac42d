"""The MLP block: as exact as PyTorch with every gradient, on every rung of the ladder, and down_proj never runs again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structcot_kernels import Projection, mlp_block, reference
from structcot_kernels.swiglu_low_rank import MAX_RANK
from tests.kernels.blocks import EPS, CountOperators, D, T, kept_bytes, keys, projection_tensors
from tests.kernels.parity import DTYPES, assert_compile_sees_it_whole, assert_parity, random

F = 80


def tensors(dtype: torch.dtype, device, ranks: tuple[int, int, int] = (16, 16, 16), trained: bool = False) -> list[Tensor | None]:
    """Hidden, norm weight, then weight, bias, A and B of gate, up and down."""
    shapes = [(F, D), (F, D), (D, F)]
    parts = [
        projection_tensors(*shape, rank, dtype, device, seed=10 * number, trained=trained, bias=number != 2)
        for number, (shape, rank) in enumerate(zip(shapes, ranks, strict=True))
    ]
    hidden_TD = random(T, D, dtype=dtype, device=device)
    norm_D = (1.0 + random(D, dtype=dtype, scale=0.3, trained=False, device=device)).requires_grad_(trained)
    return [hidden_TD, norm_D, *(tensor for part in parts for tensor in part)]


def block_of(operation, present: list[bool], dropout: float = 0.0, recompute: str = "block"):
    """The operation as a function of the tensors that are there, and keys where there is dropout."""

    def apply(*given: Tensor) -> Tensor:
        remaining = iter(given)
        hidden_TD, norm_D, *flat = (next(remaining) if there else None for there in present)
        gate, up, down = (Projection(*flat[4 * i : 4 * i + 4], scale=1.0 + 0.5 * i) for i in range(3))
        return operation(hidden_TD, norm_D, gate, up, down, EPS, dropout, next(remaining, None), recompute)

    return apply


def check(given: list[Tensor | None], extra: list[Tensor], **how) -> None:
    present = [tensor is not None for tensor in given]
    there = [tensor for tensor in given if tensor is not None] + extra
    assert_parity(block_of(mlp_block, present, **how), block_of(reference.mlp_block, present, **how), there)


@pytest.mark.parametrize("recompute", ["none", "block", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_and_every_gradient(dtype: torch.dtype, recompute: str, device, backend: str) -> None:
    check(tensors(dtype, device), [], recompute=recompute)


@pytest.mark.parametrize(
    ("ranks", "trained", "dropout"),
    [
        ((16, 5, 24), False, 0.2),
        ((0, 0, 0), True, 0.0),
        ((8, 0, 0), False, 0.0),
        ((0, 0, 8), False, 0.1),
        ((MAX_RANK + 1,) * 3, False, 0.0),
    ],
    ids=["dropout", "full", "gate-alone", "down-alone", "rank-too-large-to-ride"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_ways_through(dtype: torch.dtype, ranks, trained: bool, dropout: float, device, backend: str) -> None:
    check(tensors(dtype, device, ranks, trained), [keys(device)] if dropout else [], dropout=dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_what_is_recomputed_changes_no_bit(dropout: float, device, backend: str) -> None:
    results = []
    for recompute in ("none", "block", "full"):
        given = [*tensors(torch.bfloat16, device), keys(device)]
        block = block_of(mlp_block, [tensor is not None for tensor in given[:-1]], dropout, recompute)
        there = [tensor for tensor in given if tensor is not None]
        out_TD = block(*there)
        trained = [tensor for tensor in there if tensor.requires_grad]
        results.append([out_TD, *torch.autograd.grad(out_TD.float().square().sum(), trained)])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_the_backward_makes_gate_and_up_again_and_never_down(device, backend: str) -> None:
    given = [tensor for tensor in tensors(torch.float32, device) if tensor is not None]
    present = [tensor is not None for tensor in tensors(torch.float32, device)]
    for recompute, replays in (("none", 0), ("block", 1), ("full", 1)):
        out_TD = block_of(mlp_block, present, recompute=recompute)(*given)
        with CountOperators() as count:
            out_TD.sum().backward()
        # x W^T of gate and up are (T, D) x (D, F), and so is dy W_down, once; down would be (T, F) x (F, D), as dgate W and dup W are.
        assert count.products[(D, F)] == 2 * replays + 1
        assert count.products[(F, D)] == 2
        assert count.calls["structcot.rms_norm_forward.default"] == replays


def test_each_rung_keeps_what_it_says(device, backend: str) -> None:
    given = tensors(torch.float32, device)
    present, there = [tensor is not None for tensor in given], [tensor for tensor in given if tensor is not None]
    bytes_of = {
        rung: kept_bytes(lambda rung=rung: block_of(mlp_block, present, recompute=rung)(*there)) for rung in ("none", "block", "full")
    }
    parameters = sum(tensor.nbytes for tensor in there[1:])
    assert bytes_of["block"] == bytes_of["full"] == parameters + 4 * T * (D + 3 * 16)
    assert bytes_of["none"] == bytes_of["block"] + 4 * T * (D + 2 * F + 1)


def test_compile_sees_it_whole(device, backend: str) -> None:
    given = tensors(torch.float32, device)
    present, there = [tensor is not None for tensor in given], [tensor for tensor in given if tensor is not None]
    assert_compile_sees_it_whole(block_of(mlp_block, present), there)


def test_no_gradient_is_made_of_what_is_frozen(device, backend: str) -> None:
    hidden_TD, norm_D, *flat = tensors(torch.float32, device)
    gate, up, down = (Projection(*flat[4 * i : 4 * i + 4]) for i in range(3))
    mlp_block(hidden_TD.detach(), norm_D, gate, up, down, EPS).sum().backward()  # type: ignore[union-attr]
    assert gate.weight_NK.grad is None
    assert gate.lora_a_RK.grad is not None  # type: ignore[union-attr]


def test_operands_that_do_not_fit_are_refused(device) -> None:
    hidden_TD, norm_D, *flat = tensors(torch.float32, device)
    gate, up, down = (Projection(*flat[4 * i : 4 * i + 4]) for i in range(3))
    with pytest.raises(ValueError, match=r"mlp_block: recompute is 'some'; use one of none, block, full"):
        mlp_block(hidden_TD, norm_D, gate, up, down, EPS, recompute="some")
    with pytest.raises(ValueError, match=r"mlp_block: down weight_NK has shape \(80, 48\); it must be \(any, 80\)"):
        mlp_block(hidden_TD, norm_D, gate, up, gate, EPS)
    with pytest.raises(ValueError, match=r"mlp_block: up weight_NK has shape \(79, 48\); it must be \(80, 48\)"):
        mlp_block(hidden_TD, norm_D, gate, Projection(up.weight_NK[:79]), down, EPS)
    with pytest.raises(ValueError, match="there is dropout but dropout_keys_T is missing"):
        mlp_block(hidden_TD, norm_D, gate, up, down, EPS, 0.1)
