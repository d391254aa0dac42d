"""The norm: as exact as PyTorch, row by row independent, and every byte it moves accounted for."""

from __future__ import annotations

import pytest
import torch

from structcot_kernels import add_rms_norm, reference, rms_norm
from structcot_kernels._cost import COSTS
from structcot_kernels.launch import use_backend
from structcot_kernels.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward, rms_norm_weight_grad
from tests.kernels.parity import DTYPES, assert_parity, random

EPS = 1e-6
SHAPES = [(1, 1), (7, 63), (3, 5120), (70, 128), (300, 33)]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0], ids=["usual", "small", "large"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_its_gradients_are_as_exact_as_pytorch(dtype: torch.dtype, shape: tuple[int, int], scale: float, device) -> None:
    hidden_TD = random(*shape, dtype=dtype, scale=scale, device=device)
    weight_D = random(shape[1], dtype=dtype, device=device)
    ours, theirs = (lambda hidden, weight, norm=norm: norm(hidden, weight, EPS) for norm in (rms_norm, reference.rms_norm))
    assert_parity(ours, theirs, [hidden_TD, weight_D], ["normed", "grad hidden", "grad weight"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_add_in_front_is_as_exact_as_pytorch(dtype: torch.dtype, shape: tuple[int, int], device) -> None:
    hidden_TD, delta_TD = (random(*shape, dtype=dtype, seed=seed, device=device) for seed in (0, 1))
    weight_D = random(shape[1], dtype=dtype, trained=False, device=device)
    ours, theirs = (lambda *tensors, norm=norm: norm(*tensors, EPS) for norm in (add_rms_norm, reference.add_rms_norm))
    assert_parity(ours, theirs, [hidden_TD, delta_TD, weight_D], ["normed", "summed", "grad hidden", "grad delta"])


def test_rows_do_not_see_one_another_and_strides_do_not_matter(device) -> None:
    wide_TD = random(9, 200, dtype=torch.float32, trained=False, device=device)
    weight_D = random(100, dtype=torch.float32, trained=False, device=device)
    part_TD = wide_TD[:, 50:150]
    assert torch.equal(rms_norm(part_TD, weight_D, EPS), rms_norm(part_TD.contiguous(), weight_D, EPS))
    assert torch.equal(rms_norm(part_TD, weight_D, EPS)[3:4], rms_norm(part_TD[3:4], weight_D, EPS))


def test_strided_operands_are_read_where_they_lie(device) -> None:
    wide = [random(300, 200, dtype=torch.float32, seed=seed, trained=False, device=device) for seed in range(3)]
    hidden_TD, other_TD, grad_TD = strided = [rows_TD[:, 20 * index : 20 * index + 100] for index, rows_TD in enumerate(wide)]
    weight_D, rstd_T = wide[0][0, :100].contiguous(), torch.rand(300, device=device)
    for operator, arguments in (
        (add_rms_norm_forward, (hidden_TD, other_TD, weight_D, EPS)),
        (rms_norm_backward, (grad_TD, hidden_TD, weight_D, rstd_T, other_TD)),
        (rms_norm_weight_grad, (grad_TD, hidden_TD, rstd_T)),
    ):
        dense = [argument.contiguous() if any(argument is rows_TD for rows_TD in strided) else argument for argument in arguments]
        results, wanted = operator(*arguments), operator(*dense)
        assert all(torch.equal(one, other) for one, other in zip(results, wanted, strict=True))


def test_frozen_weight_costs_no_gradient(device) -> None:
    hidden_TD = random(5, 64, dtype=torch.float32, device=device)
    weight_D = random(64, dtype=torch.float32, trained=False, device=device)
    rms_norm(hidden_TD, weight_D, EPS).sum().backward()
    assert hidden_TD.grad is not None
    assert weight_D.grad is None


def test_no_rows_give_none(device) -> None:
    hidden_TD = random(0, 64, dtype=torch.float32, device=device)
    weight_D = random(64, dtype=torch.float32, device=device)
    normed_TD = rms_norm(hidden_TD, weight_D, EPS)
    assert normed_TD.shape == (0, 64)
    normed_TD.sum().backward()
    assert weight_D.grad is not None
    assert not weight_D.grad.any()


@pytest.mark.parametrize("width", [64, 100, 5120])
def test_bytes_moved_are_those_of_the_formula(width: int, traffic) -> None:
    hidden_TD, grad_TD = (random(6, width, dtype=torch.bfloat16, seed=seed, trained=False) for seed in (0, 1))
    weight_D = random(width, dtype=torch.bfloat16, trained=False)
    rstd_T = torch.ones(6)
    # Each program reads the weight; beyond the first it comes from the cache, so one row block is what the formula speaks of.
    for operator, arguments in (
        (rms_norm_forward, (hidden_TD, weight_D, EPS)),
        (add_rms_norm_forward, (hidden_TD, grad_TD, weight_D, EPS)),
        (rms_norm_backward, (grad_TD, hidden_TD, weight_D, rstd_T, grad_TD)),
    ):
        (cost,) = COSTS[operator._opoverload](*arguments)
        with traffic() as counted:
            operator(*arguments)
        programs = 6 if width == 5120 else 1
        assert counted.loaded + counted.stored == cost.bytes + (programs - 1) * width * 2, operator


def test_operators_are_registered_soundly(device) -> None:
    hidden_TD, grad_TD = (random(5, 64, dtype=torch.float32, seed=seed, device=device) for seed in (0, 1))
    weight_D, rstd_T = random(64, dtype=torch.float32, device=device), torch.ones(5, device=device)
    torch.library.opcheck(rms_norm_forward, (hidden_TD, weight_D, EPS))
    torch.library.opcheck(add_rms_norm_forward, (hidden_TD, grad_TD, weight_D, EPS))
    frozen = [tensor.detach() for tensor in (grad_TD, hidden_TD, weight_D, rstd_T)]
    torch.library.opcheck(rms_norm_backward, (*frozen, frozen[0]))
    torch.library.opcheck(rms_norm_weight_grad, (frozen[0], frozen[1], frozen[3]))


@pytest.mark.parametrize(
    ("hidden_shape", "weight_shape", "dtype", "error", "words"),
    [
        ((4, 64), (63,), torch.float32, ValueError, r"weight_D has shape \(63,\); it must be \(64\)"),
        ((4, 64), (64,), torch.bfloat16, TypeError, r"weight_D is torch.bfloat16; it must be torch.float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(hidden_shape, weight_shape, dtype, error, words, device) -> None:
    hidden_TD = random(*hidden_shape, dtype=torch.float32, device=device)
    weight_D = random(*weight_shape, dtype=dtype, device=device)
    with pytest.raises(error, match=words):
        rms_norm(hidden_TD, weight_D, EPS)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_operand_is_written_to(backend: str, device) -> None:
    use_backend(backend)
    hidden_TD, grad_TD, delta_TD = (random(5, 64, dtype=torch.float32, seed=seed, trained=False, device=device) for seed in range(3))
    weight_D, rstd_T = random(64, dtype=torch.float32, trained=False, device=device), torch.rand(5, device=device)
    before = [tensor.clone() for tensor in (hidden_TD, grad_TD, delta_TD, weight_D, rstd_T)]
    add_rms_norm_forward(hidden_TD, delta_TD, weight_D, EPS)
    rms_norm_backward(grad_TD, hidden_TD, weight_D, rstd_T, delta_TD)
    rms_norm_weight_grad(grad_TD, hidden_TD, rstd_T)
    assert all(torch.equal(*pair) for pair in zip(before, (hidden_TD, grad_TD, delta_TD, weight_D, rstd_T), strict=True))


def test_the_added_rows_alone_may_need_a_gradient(device) -> None:
    hidden_TD, delta_TD = (random(5, 64, dtype=torch.float32, seed=seed, device=device) for seed in (0, 1))
    weight_D = random(64, dtype=torch.float32, trained=False, device=device)
    both = torch.autograd.grad(add_rms_norm(hidden_TD, delta_TD, weight_D, EPS)[0].square().sum(), (hidden_TD, delta_TD))
    (alone,) = torch.autograd.grad(add_rms_norm(hidden_TD.detach(), delta_TD, weight_D, EPS)[0].square().sum(), delta_TD)
    assert torch.equal(alone, both[1])
