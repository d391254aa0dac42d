"""Rotary positions: as exact as PyTorch for every kind of table, turned back exactly, and nothing read outside the table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structcot.model.rotary import rotary_tables
from structcot.model.spec import ModelSpec, RopeSpec
from structcot_kernels import reference, rope
from structcot_kernels._cost import COSTS
from structcot_kernels.rope import rope_forward
from tests.kernels.parity import DTYPES, assert_parity, random

SHAPES = [(1, 1, 2), (7, 3, 12), (33, 9, 64), (5, 40, 128), (3, 2, 192)]
"""T, H, d."""
ROPES = {
    "default": RopeSpec(kind="default", theta=1e6),
    "llama3": RopeSpec(kind="llama3", theta=5e5, factor=8.0, original_positions=64),
    "yarn": RopeSpec(kind="yarn", theta=1e4, factor=4.0, original_positions=64, attention_factor=1.1386),
}


def tables(width: int, device, kind: str = "default", num_positions: int = 256) -> tuple[Tensor, Tensor]:
    """Cosines and sines as the decoder makes them."""
    spec = ModelSpec(**dict.fromkeys(ModelSpec.__slots__, 0) | {"rope": ROPES[kind], "head_dim": width})  # type: ignore[arg-type]
    return rotary_tables(spec, num_positions, device)


def positions(num_tokens: int, device, largest: int = 256) -> Tensor:
    return torch.randint(0, largest, (num_tokens,), generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turned_heads_and_their_gradient_are_as_exact_as_pytorch(dtype, shape, kind: str, device, backend: str) -> None:
    cos_Pd, sin_Pd = tables(shape[2], device, kind)
    positions_T = positions(shape[0], device)

    def theirs(heads: Tensor) -> Tensor:
        wide = torch.promote_types(heads.dtype, torch.float32)
        return reference.rope(heads, positions_T, cos_Pd.to(wide), sin_Pd.to(wide))

    assert_parity(lambda heads: rope(heads, positions_T, cos_Pd, sin_Pd), theirs, [random(*shape, dtype=dtype, device=device)])


def test_turning_back_undoes_it(device, backend: str) -> None:
    heads_THd = random(20, 3, 64, dtype=torch.float32, trained=False, device=device)
    place = (positions(20, device), *tables(64, device))
    turned_THd = rope_forward(heads_THd, *place, False)
    assert not torch.allclose(turned_THd, heads_THd, atol=0.1)
    torch.testing.assert_close(rope_forward(turned_THd, *place, True), heads_THd, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_wider_buffer_is_read_where_it_lies(device, backend: str) -> None:
    qkv_TN = random(11, 7 * 16, dtype=torch.float32, trained=False, device=device)
    place = (positions(11, device), *tables(16, device))
    heads_THd = qkv_TN[:, 32:80].unflatten(1, (3, 16))
    assert not heads_THd.is_contiguous()
    assert torch.equal(rope(heads_THd, *place), rope(heads_THd.contiguous(), *place))


def test_offsets_beyond_32_bits(device) -> None:
    stride = 2**30
    try:
        # The first half is never touched: there 32-bit offsets of the third token would end.
        memory = torch.empty(2**31 + 2 * stride + 48, dtype=torch.bfloat16, device=device)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("8.6 GB of address space are not to be had here")
    heads_THd, alone_THd = memory.as_strided((3, 3, 16), (stride, 16, 1), 2**31), random(3, 3, 16, dtype=torch.bfloat16, trained=False)
    heads_THd.copy_(alone_THd)
    place = (positions(3, device), *tables(16, device))
    assert torch.equal(rope_forward(heads_THd, *place, False), rope_forward(alone_THd.to(device), *place, False))


@pytest.mark.parametrize("outside", [-1, 256, 2**40])
def test_a_position_outside_the_table_shows_as_nan_in_its_own_token(outside: int, device, backend: str) -> None:
    heads_THd = random(9, 3, 16, dtype=torch.float32, trained=False, device=device)
    positions_T = positions(9, device)
    positions_T[4] = outside
    wrong_T = rope(heads_THd, positions_T, *tables(16, device)).isnan().flatten(1).all(1)
    assert wrong_T.nonzero().flatten().tolist() == [4]
    assert rope(heads_THd, positions_T, *tables(16, device)).isnan().sum() == 3 * 16


def test_no_tokens_give_none_and_two_runs_the_same_bits(device, backend: str) -> None:
    place = tables(16, device)
    assert rope(random(0, 3, 16, dtype=torch.float32, device=device), positions(0, device), *place).shape == (0, 3, 16)
    heads_THd, positions_T = random(9, 3, 16, dtype=torch.bfloat16, trained=False, device=device), positions(9, device)
    assert torch.equal(rope(heads_THd, positions_T, *place), rope(heads_THd, positions_T, *place))


@pytest.mark.parametrize("shape", [(7, 3, 12), (33, 9, 64), (2, 100, 128)], ids=str)
def test_bytes_moved_are_those_of_the_formula(shape: tuple[int, int, int], traffic) -> None:
    heads_THd = random(*shape, dtype=torch.bfloat16, trained=False)
    arguments = (heads_THd, positions(shape[0], "cpu"), *tables(shape[2], "cpu"), False)
    (cost,) = COSTS[rope_forward._opoverload](*arguments)
    with traffic() as counted:
        rope_forward(*arguments)
    assert counted.loaded + counted.stored == cost.bytes + cost.cached_bytes


def test_operator_is_registered_soundly(device) -> None:
    heads_THd = random(5, 3, 16, dtype=torch.float32, device=device)
    torch.library.opcheck(rope_forward, (heads_THd, positions(5, device), *tables(16, device), False))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"positions_T": lambda p: p[:4]}, ValueError, r"positions_T has shape \(4,\); it must be \(5\)"),
        ({"positions_T": lambda p: p.int()}, TypeError, r"positions_T is torch.int32; it must be torch.int64"),
        ({"cos_Pd": lambda c: c.bfloat16()}, TypeError, r"cos_Pd is torch.bfloat16; it must be torch.float32"),
        ({"sin_Pd": lambda s: s[:, :8]}, ValueError, r"sin_Pd has shape \(256, 8\); it must be \(any, 16\)"),
        ({"sin_Pd": lambda s: s[:100]}, ValueError, r"sin_Pd has shape \(100, 16\); it must be \(256, 16\)"),
        ({"cos_Pd": lambda c: c.T.contiguous().T}, ValueError, r"cos_Pd has strides \(1, 256\); call contiguous\(\) first"),
        ({"heads_THd": lambda h: h.transpose(1, 2).contiguous().transpose(1, 2)}, ValueError, "a token's heads must lie side by side"),
        ({"heads_THd": lambda h: h.repeat(1, 1, 2)[:, :1, ::2]}, ValueError, "a token's heads must lie side by side"),
        ({"heads_THd": lambda h: h[:, :1, :1].expand(5, 1, 16)}, ValueError, "a token's heads must lie side by side"),
        ({"heads_THd": lambda h: h[..., :15].contiguous()}, ValueError, "the width must be even"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_that_do_not_fit_are_refused(change, error, words: str, device) -> None:
    cos_Pd, sin_Pd = tables(16, device)
    heads_THd = random(5, 3, 16, dtype=torch.float32, device=device)
    given = {"heads_THd": heads_THd, "positions_T": positions(5, device), "cos_Pd": cos_Pd, "sin_Pd": sin_Pd}
    with pytest.raises(error, match=words):
        rope(**{name: change.get(name, lambda tensor: tensor)(tensor) for name, tensor in given.items()})
