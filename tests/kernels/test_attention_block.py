"""The attention block: as exact as PyTorch with every gradient, on every rung; o_proj never runs again, attention only where asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structcot_kernels import Projection, attention_block, reference
from tests.kernels.blocks import EPS, LENGTHS, CountOperators, D, T, kept_bytes, keys, projection_tensors
from tests.kernels.parity import DTYPES, assert_compile_sees_it_whole, assert_parity, random

H, G, HEAD = 6, 2, 16


def tensors(
    dtype: torch.dtype, device, ranks: tuple[int, ...] = (16, 8, 16, 16), trained: bool = False, head_norms: bool = False
) -> list[Tensor | None]:
    """Hidden, norm weight, head norms, then weight, bias, A and B of q, k, v and o."""
    shapes = [(H * HEAD, D), (G * HEAD, D), (G * HEAD, D), (D, H * HEAD)]
    parts = [
        projection_tensors(*shape, rank, dtype, device, seed=10 * number, trained=trained, bias=number != 3)
        for number, (shape, rank) in enumerate(zip(shapes, ranks, strict=True))
    ]
    hidden_TD = random(T, D, dtype=dtype, device=device)
    norms = [
        (1.0 + random(size, dtype=dtype, seed=size, scale=0.3, trained=False, device=device)).requires_grad_(trained)
        for size in (D, HEAD, HEAD + 1)
    ]
    heads = [norms[1], norms[2][:HEAD].detach().requires_grad_(trained)] if head_norms else [None, None]
    return [hidden_TD, norms[0], *heads, *(tensor for part in parts for tensor in part)]


def places(device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, both rotary tables and the borders."""
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS])
    angles_Ph = torch.arange(32.0)[:, None] * 100.0 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
    cos_Pd, sin_Pd = (torch.cat((table, table), dim=1).to(device) for table in (angles_Ph.cos(), angles_Ph.sin()))
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return positions_T.to(device), cos_Pd, sin_Pd, borders.to(device)


def block_of(operation, present: list[bool], device, dropout: float = 0.0, recompute: str = "block"):
    """The operation as a function of the tensors that are there, and keys where there is dropout."""

    def apply(*given: Tensor) -> Tensor:
        remaining = iter(given)
        hidden_TD, norm_D, q_norm, k_norm, *flat = (next(remaining) if there else None for there in present)
        group = (Projection(*flat[4 * i : 4 * i + 4], scale=1.0 + 0.5 * i) for i in range(4))
        key = next(remaining, None)
        return operation(hidden_TD, norm_D, *group, *places(device), max(LENGTHS), EPS, q_norm, k_norm, dropout, key, recompute=recompute)

    return apply


def split(given: list[Tensor | None]) -> tuple[list[bool], list[Tensor]]:
    return [tensor is not None for tensor in given], [tensor for tensor in given if tensor is not None]


def check(given: list[Tensor | None], extra: list[Tensor], device, **how) -> None:
    present, there = split(given)
    assert_parity(
        block_of(attention_block, present, device, **how), block_of(reference.attention_block, present, device, **how), there + extra
    )


@pytest.mark.parametrize("recompute", ["none", "block", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_and_every_gradient(dtype: torch.dtype, recompute: str, device, backend: str) -> None:
    check(tensors(dtype, device), [], device, recompute=recompute)


@pytest.mark.parametrize(
    ("how", "dropout"),
    [({}, 0.2), ({"ranks": (0, 0, 0, 0), "trained": True, "head_norms": True}, 0.0), ({"ranks": (8, 0, 8, 0), "head_norms": True}, 0.1)],
    ids=["dropout", "full-with-head-norms", "q-and-v-alone"],
)
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_ways_through(dtype: torch.dtype, recompute: str, how: dict, dropout: float, device, backend: str) -> None:
    check(tensors(dtype, device, **how), [keys(device)] if dropout else [], device, dropout=dropout, recompute=recompute)


@pytest.mark.parametrize("head_norms", [False, True])
def test_what_is_recomputed_changes_no_bit(head_norms: bool, device, backend: str) -> None:
    results = []
    for recompute in ("none", "block", "full"):
        present, there = split(tensors(torch.bfloat16, device, head_norms=head_norms))
        out_TD = block_of(attention_block, present, device, 0.2, recompute)(*there, keys(device))
        trained = [tensor for tensor in there if tensor.requires_grad]
        results.append([out_TD, *torch.autograd.grad(out_TD.float().square().sum(), trained)])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_the_backward_never_makes_o_proj_again_and_attention_only_where_asked(device, backend: str) -> None:
    present, there = split(tensors(torch.float32, device))
    for recompute, replays, attention in (("none", 0, 0), ("block", 1, 0), ("full", 1, 1)):
        out_TD = block_of(attention_block, present, device, recompute=recompute)(*there)
        with CountOperators() as count:
            out_TD.sum().backward()
        # q is (T, D) x (D, H d), and so is dy W_o, once; o would be (T, H d) x (H d, D), as dq W_q is.
        assert count.products[(D, H * HEAD)] == replays + 1
        assert count.products[(H * HEAD, D)] == 1
        assert count.products[(D, G * HEAD)] == 2 * replays
        assert count.calls["structcot.attention_forward.default"] == attention
        assert count.calls["structcot.attention_backward.default"] == 1


def test_each_rung_keeps_what_it_says(device, backend: str) -> None:
    present, there = split(tensors(torch.float32, device))
    bytes_of = {
        rung: kept_bytes(lambda rung=rung: block_of(attention_block, present, device, recompute=rung)(*there))
        for rung in ("none", "block", "full")
    }
    parameters = sum(tensor.nbytes for tensor in there[1:]) + sum(tensor.nbytes for tensor in places(device))
    assert bytes_of["full"] == parameters + 4 * T * (D + 16 + 8 + 16 + 16)
    assert bytes_of["block"] == bytes_of["full"] + 4 * T * (H * HEAD + H)
    assert bytes_of["none"] == bytes_of["block"] + 4 * T * (D + 1 + (H + 2 * G) * HEAD)


def test_compile_sees_it_whole(device, backend: str) -> None:
    present, there = split(tensors(torch.float32, device))
    assert_compile_sees_it_whole(block_of(attention_block, present, device), there)


def test_operands_that_do_not_fit_are_refused(device) -> None:
    hidden_TD, norm_D, _, _, *flat = tensors(torch.float32, device)
    q, k, v, o = (Projection(*flat[4 * i : 4 * i + 4]) for i in range(4))
    rest = (*places(device), max(LENGTHS), EPS)
    with pytest.raises(ValueError, match=r"attention_block: recompute is 'some'; use one of none, block, full"):
        attention_block(hidden_TD, norm_D, q, k, v, o, *rest, recompute="some")
    with pytest.raises(ValueError, match=r"attention_block: o weight_NK has shape \(96, 48\)"):
        attention_block(hidden_TD, norm_D, q, k, v, q, *rest)
    with pytest.raises(ValueError, match="only one of q_norm_d and k_norm_d; give both or neither"):
        attention_block(hidden_TD, norm_D, q, k, v, o, *rest, q_norm_d=norm_D[:HEAD])
    with pytest.raises(ValueError, match=r"dropout_keys_T has shape \(36,\); it must be \(37\)"):
        attention_block(hidden_TD, norm_D, q, k, v, o, *rest, dropout=0.1, dropout_keys_T=keys(device)[:36])
