"""SwiGLU: as exact as PyTorch, the activation made again in the backward, every byte accounted for."""

from __future__ import annotations

import pytest
import torch

from structcot_kernels import reference, swiglu
from structcot_kernels._cost import COSTS
from structcot_kernels.swiglu import swiglu_backward, swiglu_forward
from tests.kernels.parity import DTYPES, FLOORS, assert_as_exact, assert_parity, random

SHAPES = [(1, 1), (7, 63), (3, 5120), (70, 128), (9, 1025)]


@pytest.mark.parametrize("spread", [1.0, 1e-3, 30.0], ids=["usual", "small", "peaked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_and_gradients_are_as_exact_as_pytorch(dtype, shape: tuple[int, int], spread: float, device, backend: str) -> None:
    gate_TF, up_TF = random(*shape, dtype=dtype, scale=spread, device=device), random(*shape, dtype=dtype, seed=1, device=device)
    assert_parity(swiglu, reference.swiglu, [gate_TF, up_TF], ["act", "grad gate", "grad up"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backward_makes_the_activation_again_where_it_is_asked_to(dtype: torch.dtype, device, backend: str) -> None:
    grad_TF, gate_TF, up_TF = (random(9, 100, dtype=dtype, seed=seed, trained=False, device=device) for seed in range(3))
    with_act, without = (swiglu_backward(grad_TF, gate_TF, up_TF, need_act) for need_act in (True, False))
    assert without[2].numel() == 0
    assert all(torch.equal(one, other) for one, other in zip(with_act[:2], without[:2], strict=True))
    truth_TF = reference.swiglu(gate_TF.double(), up_TF.double())
    assert_as_exact(with_act[2], reference.swiglu(gate_TF, up_TF), truth_TF, FLOORS[dtype], "act")


def test_no_operand_is_written_to_and_two_runs_give_the_same_bits(device, backend: str) -> None:
    given = [random(9, 100, dtype=torch.float32, seed=seed, trained=False, device=device) for seed in range(3)]
    before = [tensor.clone() for tensor in given]
    first, second = (swiglu_backward(*given, True) for _ in range(2))
    swiglu_forward(*given[1:])
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_parts_of_a_wider_buffer_are_read_where_they_lie(device, backend: str) -> None:
    wide = (random(9, width, dtype=torch.float32, trained=False, device=device) for width in (80, 100, 120))
    grad_TF, gate_TF, up_TF = (buffer[:, 8:48] for buffer in wide)  # each of a stride of its own
    alone = [part.contiguous() for part in (grad_TF, gate_TF, up_TF)]
    for got, wanted in (
        (swiglu_forward(gate_TF, up_TF), swiglu_forward(*alone[1:])),
        *zip(swiglu_backward(grad_TF, gate_TF, up_TF, True), swiglu_backward(*alone, True), strict=True),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # PyTorch takes another loop for another stride


def test_offsets_beyond_32_bits(device) -> None:
    stride = 2**30
    try:
        # The first half is never touched: there 32-bit offsets of the third row would end.
        memory = torch.empty(2**31 + 2 * stride + 120, dtype=torch.bfloat16, device=device)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("8.6 GB of address space are not to be had here")
    grad_TF, gate_TF, up_TF = (memory.as_strided((3, 40), (stride, 1), 2**31 + 40 * place) for place in range(3))
    alone = [random(3, 40, dtype=torch.bfloat16, seed=seed, trained=False, device=device) for seed in range(3)]
    for part, values in zip((grad_TF, gate_TF, up_TF), alone, strict=True):
        part.copy_(values)
    assert torch.equal(swiglu_forward(gate_TF, up_TF), swiglu_forward(*alone[1:]))
    for got, wanted in zip(swiglu_backward(grad_TF, gate_TF, up_TF, True), swiglu_backward(*alone, True), strict=True):
        assert torch.equal(got, wanted)


def test_no_rows_give_none(device, backend: str) -> None:
    gate_TF = random(0, 20, dtype=torch.float32, device=device)
    out_TF = swiglu(gate_TF, gate_TF)
    assert out_TF.shape == (0, 20)
    out_TF.sum().backward()


@pytest.mark.parametrize("shape", [(7, 63), (9, 1025)], ids=str)
def test_bytes_moved_are_those_of_the_formula(shape: tuple[int, int], traffic) -> None:
    grad_TF, gate_TF, up_TF = (random(*shape, dtype=torch.bfloat16, seed=seed, trained=False) for seed in range(3))
    for operator, arguments in (
        (swiglu_forward, (gate_TF, up_TF)),
        (swiglu_backward, (grad_TF, gate_TF, up_TF, False)),
        (swiglu_backward, (grad_TF, gate_TF, up_TF, True)),
    ):
        (cost,) = COSTS[operator._opoverload](*arguments)
        with traffic() as counted:
            operator(*arguments)
        assert counted.loaded + counted.stored == cost.bytes, operator


def test_operators_are_registered_soundly(device) -> None:
    gate_TF, up_TF = (random(5, 20, dtype=torch.float32, seed=seed, device=device) for seed in range(2))
    torch.library.opcheck(swiglu_forward, (gate_TF, up_TF))
    for need_act in (False, True):
        torch.library.opcheck(swiglu_backward, (up_TF.detach(), gate_TF.detach(), up_TF.detach(), need_act))


def test_operands_that_do_not_fit_are_refused(device) -> None:
    gate_TF = random(5, 20, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"up_TF has shape \(5, 19\); it must be \(5, 20\)"):
        swiglu(gate_TF, gate_TF[:, :19])
    with pytest.raises(TypeError, match=r"up_TF is torch.bfloat16; it must be torch.float32"):
        swiglu(gate_TF, gate_TF.bfloat16())
    with pytest.raises(ValueError, match="strides"):
        swiglu(gate_TF.T, gate_TF.T)
