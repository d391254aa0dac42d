"""Low-rank products: as exact as PyTorch at any rank, dropout found anew in whatever tiling, every byte accounted for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structcot_kernels._cost import COSTS
from structcot_kernels.jit import low_rank as jit
from structcot_kernels.low_rank import low_rank_down, low_rank_down_dropped, low_rank_grad, low_rank_up
from structcot_kernels.reference import keep_mask
from tests.kernels.parity import DTYPES, FLOORS, assert_as_exact, random

SHAPES = [(1, 1, 1), (7, 63, 3), (70, 130, 16), (129, 96, 40), (40, 33, 200)]
"""T, N, R."""


def tensors(shape: tuple[int, int, int], dtype: torch.dtype, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S (T, R), B (N, R), rows (T, N), and keys."""
    num_rows, width, rank = shape
    s_TR, b_NR, rows_TN = (
        random(*size, dtype=dtype, seed=seed, trained=False, device=device)
        for seed, size in enumerate([(num_rows, rank), (width, rank), (num_rows, width)])
    )
    keys_T = torch.randint(-(2**62), 2**62, (num_rows,), generator=torch.Generator().manual_seed(1)).to(device)
    return s_TR, b_NR, rows_TN, keys_T


def dropped(x: Tensor, dropout: float, keys_T: Tensor) -> Tensor:
    return x * keep_mask(keys_T, x.shape[1], dropout) / (1.0 - dropout) if dropout else x


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_as_exact_as_pytorch(dtype: torch.dtype, shape: tuple[int, int, int], dropout: float, device, backend: str) -> None:
    s_TR, b_NR, rows_TN, keys_T = tensors(shape, dtype, device)
    bias_N = random(shape[1], dtype=dtype, trained=False, device=device)
    a_RN = b_NR.T.contiguous()

    def plain(s: Tensor, b: Tensor, rows: Tensor, bias: Tensor) -> dict[str, Tensor]:
        return {
            "down": dropped(rows, dropout, keys_T) @ b,
            "up": rows + bias + 1.7 * dropped(s @ b.T, dropout, keys_T),
            "up alone": 1.7 * dropped(s @ b.T, dropout, keys_T),
            "grad": 1.7 * (s.T @ dropped(rows, dropout, keys_T)),
        }

    ours = {
        "down": low_rank_down(rows_TN, a_RN, dropout, keys_T),
        "up": low_rank_up(s_TR, b_NR, 1.7, rows_TN, bias_N, dropout, keys_T),
        "up alone": low_rank_up(s_TR, a_RN.T, 1.7, None, None, dropout, keys_T),
        "grad": low_rank_grad(s_TR, rows_TN, 1.7, False, dropout, keys_T),
    }
    theirs = plain(s_TR, b_NR, rows_TN, bias_N)
    truth = plain(s_TR.double(), b_NR.double(), rows_TN.double(), bias_N.double())
    for name, value in ours.items():
        assert_as_exact(value, theirs[name], truth[name], FLOORS[dtype], name)
    assert ours["grad"].dtype == torch.float32
    transposed = low_rank_grad(s_TR, rows_TN, 1.7, True, dropout, keys_T)
    assert transposed.is_contiguous()
    assert_as_exact(transposed, theirs["grad"].T, truth["grad"].T, FLOORS[dtype], "grad transposed")


def test_a_narrow_sum_over_many_tokens_is_kept_in_fp32(device) -> None:
    # In bf16 a sum of ones stops at 256; chunk by chunk it must not.
    ones_TR, ones_TN = (torch.ones(3000, width, dtype=torch.bfloat16, device=device) for width in (2, 5))
    assert torch.equal(low_rank_grad(ones_TR, ones_TN, 1.0, False).cpu(), torch.full((2, 5), 3000.0))


@pytest.mark.parametrize("num_rows", [1, 64, 65, 1000, 16384])
@pytest.mark.parametrize(("width", "rank"), [(1, 1), (5120, 64), (27648, 192), (576, 512)])
def test_chunks_cover_every_row_once_and_none_is_empty(num_rows: int, width: int, rank: int) -> None:
    num_chunks, rows_at_once = jit.chunks_of(num_rows, width, rank)
    assert (num_chunks - 1) * rows_at_once < num_rows <= num_chunks * rows_at_once
    assert rows_at_once % jit.grad_tile(rank)["BLOCK_T"] == 0


def test_many_chunks_add_up_and_repeat_bit_for_bit(device, monkeypatch: pytest.MonkeyPatch) -> None:
    s_TR, _, rows_TN, keys_T = tensors((300, 40, 5), torch.bfloat16, device)
    assert jit.chunks_of(300, 40, 5) == (5, 64)
    many = [low_rank_grad(s_TR, rows_TN, 1.0, False, 0.2, keys_T) for _ in range(2)]
    assert torch.equal(*many)
    monkeypatch.setattr("structcot_kernels.launch.MIN_PROGRAMS", 1)
    assert jit.chunks_of(300, 40, 5) == (1, 320)
    torch.testing.assert_close(low_rank_grad(s_TR, rows_TN, 1.0, False, 0.2, keys_T), many[0], rtol=1e-5, atol=1e-5)


def test_what_is_dropped_does_not_depend_on_the_tiling_or_the_backend(device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, rows_TN, keys_T = tensors((70, 130, 4), torch.float32, device)
    wanted_TN = keep_mask(keys_T, 130, 0.4)
    eye = torch.eye(130, device=device)
    ones_TN = torch.ones_like(rows_TN)
    for blocks in (16, 32, 64):
        tile = {"BLOCK_T": blocks, "BLOCK_R": 16, "BLOCK_K": blocks, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(jit, "down_tile", lambda rank, tile=tile: tile)
        assert torch.equal(low_rank_down(ones_TN, eye, 0.4, keys_T) != 0, wanted_TN)
        wide = {"BLOCK_T": blocks, "BLOCK_N": blocks, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(jit, "up_tile", lambda rank, tile=wide: tile)
        assert torch.equal(low_rank_up(ones_TN, torch.ones(130, 130, device=device), 1.0, None, None, 0.4, keys_T) != 0, wanted_TN)
        monkeypatch.setattr(jit, "grad_tile", lambda rank, tile=wide: tile)
        assert torch.equal(low_rank_grad(torch.eye(70, device=device), ones_TN, 1.0, False, 0.4, keys_T) != 0, wanted_TN)


def test_strided_operands_are_read_where_they_lie(device, backend: str) -> None:
    wide_TR, _, wide_TN, keys_T = tensors((50, 80, 48), torch.float32, device)
    s_TR, rows_TN = wide_TR[:, 16:32], wide_TN[:, 8:72]
    b_NR = random(64, 16, dtype=torch.float32, trained=False, device=device)
    for operation in (
        lambda s, rows: low_rank_up(s, b_NR, 1.0, rows),
        lambda s, rows: low_rank_grad(s, rows, 1.0, True),
        lambda s, rows: low_rank_down(rows, b_NR.T.contiguous(), 0.1, keys_T),
    ):
        assert torch.equal(operation(s_TR, rows_TN), operation(s_TR.contiguous(), rows_TN.contiguous()))


def test_no_rows_give_none(device, backend: str) -> None:
    s_TR, b_NR, rows_TN, keys_T = tensors((0, 20, 4), torch.float32, device)
    assert low_rank_up(s_TR, b_NR, 1.0).shape == (0, 20)
    assert low_rank_down(rows_TN, b_NR.T.contiguous(), 0.1, keys_T).shape == (0, 4)
    assert torch.equal(low_rank_grad(s_TR, rows_TN, 1.0, False), torch.zeros(4, 20, device=device))


@pytest.mark.parametrize("shape", [(70, 130, 16), (300, 40, 5), (130, 260, 200)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_bytes_moved_are_those_of_the_formula(shape: tuple[int, int, int], dropout: float, traffic) -> None:
    s_TR, b_NR, rows_TN, keys_T = tensors(shape, torch.bfloat16, "cpu")
    bias_N, a_RN = rows_TN[0].contiguous(), b_NR.T.contiguous()
    calls = [
        (low_rank_up, (s_TR, b_NR, 1.0, rows_TN, bias_N, dropout, keys_T)),
        (low_rank_up, (s_TR, a_RN.T, 1.0)),
        (low_rank_grad, (s_TR, rows_TN, 1.0, True, dropout, keys_T)),
    ]
    if dropout:
        calls.append((low_rank_down_dropped, (rows_TN, a_RN, dropout, keys_T)))
    for operator, arguments in calls:
        kernel, *added_up = COSTS[operator._opoverload](*arguments)
        with traffic() as counted:
            operator(*arguments)
        assert counted.loaded + counted.stored == kernel.bytes + kernel.cached_bytes, operator
        assert len(added_up) == (operator is low_rank_grad and jit.chunks_of(*shape)[0] > 1)


def test_operators_are_registered_soundly(device) -> None:
    s_TR, b_NR, rows_TN, keys_T = tensors((5, 20, 4), torch.float32, device)
    torch.library.opcheck(low_rank_up, (s_TR, b_NR, 2.0, rows_TN, rows_TN[0].contiguous(), 0.1, keys_T))
    torch.library.opcheck(low_rank_grad, (s_TR, rows_TN, 2.0, True, 0.1, keys_T))
    torch.library.opcheck(low_rank_down_dropped, (rows_TN, b_NR.T.contiguous(), 0.1, keys_T))


def test_operands_that_do_not_fit_are_refused(device, backend: str) -> None:
    s_TR, b_NR, rows_TN, keys_T = tensors((5, 20, 4), torch.float32, device)
    with pytest.raises(ValueError, match=r"b_NR has shape \(20, 3\); it must be \(any, 4\)"):
        low_rank_up(s_TR, b_NR[:, :3], 1.0)
    with pytest.raises(ValueError, match=r"start_TN has shape \(5, 19\); it must be \(5, 20\)"):
        low_rank_up(s_TR, b_NR, 1.0, rows_TN[:, :19])
    with pytest.raises(ValueError, match="bias_N"):
        low_rank_up(s_TR, b_NR, 1.0, None, rows_TN[0, :4])
    with pytest.raises(TypeError, match=r"right_TN is torch.bfloat16; it must be torch.float32"):
        low_rank_grad(s_TR, rows_TN.bfloat16(), 1.0, False)
    with pytest.raises(ValueError, match="dropout_keys_T is missing"):
        low_rank_down(rows_TN, b_NR.T.contiguous(), 0.1)
    with pytest.raises(TypeError, match=r"dropout_keys_T is torch.int32; it must be torch.int64"):
        low_rank_up(s_TR, b_NR, 1.0, None, None, 0.1, keys_T.int())
