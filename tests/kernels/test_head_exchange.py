"""Attention over tokens that ranks share: what all slices give together is what one process gives, with every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from structcot.config import ParallelConfig
from structcot.distributed import joined
from structcot_kernels import Projection, attention_block, reference
from structcot_kernels._head_exchange import HeadExchange, all_heads_of_tokens, heads_of_all_tokens, need_exchange, repeats_for
from tests.kernels.blocks import EPS, LENGTHS, D, T, keys, projection_tensors
from tests.kernels.parity import FLOORS, assert_as_exact, random
from tests.kernels.test_attention_block import places
from tests.ranks import CPU, on_ranks

HEAD = 16
HEADS = {"enough": (4, 4), "shared": (4, 2), "fewer than ranks": (8, 2), "one for all": (4, 1)}  # query heads, key-value heads
Tensors = dict[str, Tensor]


def block_tensors(num_heads: int, num_kv_heads: int) -> Tensors:
    """Hidden and norm, then weight, bias, A and B of q, k, v and o, and the gradient of the result."""
    tensors = {"hidden_TD": random(T, D, dtype=torch.float32), "norm_D": 1.0 + random(D, dtype=torch.float32, seed=1, scale=0.3).detach()}
    shapes = {"q": (num_heads * HEAD, D), "k": (num_kv_heads * HEAD, D), "v": (num_kv_heads * HEAD, D), "o": (D, num_heads * HEAD)}
    for seed, (name, shape) in enumerate(shapes.items()):
        parts = projection_tensors(*shape, 8, torch.float32, CPU, seed=10 * seed, trained=True)
        tensors |= {
            f"{name} {part}": tensor for part, tensor in zip(("weight", "bias", "a", "b"), parts, strict=True) if tensor is not None
        }
    tensors["grad_TD"] = random(T, D, dtype=torch.float32, seed=7)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def run_block(operation: Callable[..., Tensor], given: Tensors, recompute: str, exchange: HeadExchange | None = None) -> Tensors:
    """The result and the gradients of all tensors, of this rank's slice where there is an exchange."""
    own = slice(0, T)
    if exchange is not None:
        start = sum(exchange.tokens_U[: exchange.rank])
        own = slice(start, start + exchange.num_tokens)
    leaves = {name: (tensor[own] if name == "hidden_TD" else tensor).clone().requires_grad_() for name, tensor in given.items()}
    group = (Projection(*(leaves[f"{name} {part}"] for part in ("weight", "bias", "a", "b")), scale=1.5) for name in "qkvo")
    positions_T, *tables, borders = places(CPU)
    result_TD = operation(
        leaves["hidden_TD"],
        leaves["norm_D"],
        *group,
        positions_T[own],
        *tables,
        borders,
        max(LENGTHS),
        EPS,
        dropout=0.2,
        dropout_keys_T=keys(CPU)[own],
        recompute=recompute,
        exchange=exchange,
    )
    result_TD.backward(given["grad_TD"][own])
    grads = {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"result": result_TD.detach(), **grads}


def run_slices(given: Tensors, recompute: str, degree: int) -> list[Tensors]:
    """The operation and its reference, on this rank's slice."""
    with joined(ParallelConfig(sequence=degree), CPU) as world:  # type: ignore[arg-type]
        cuts = np.arange(degree + 1) * T // degree
        exchange = HeadExchange(world.sequence_group, tuple(np.diff(cuts).tolist()))  # type: ignore[arg-type]
        return [run_block(operation, given, recompute, exchange) for operation in (attention_block, reference.attention_block)]


@pytest.mark.parametrize("recompute", ["none", "block", "full"])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_slices_of_all_ranks_are_the_whole(heads: tuple[int, int], degree: int, recompute: str) -> None:
    given = block_tensors(*heads)
    truth = run_block(reference.attention_block, {name: tensor.double() for name, tensor in given.items()}, recompute)
    alone = run_block(attention_block, given, recompute)
    for parts in zip(*on_ranks(degree, run_slices, given, recompute, degree), strict=True):
        whole: dict[str, Any] = {name: sum(part[name] for part in parts) for name in parts[0] if name not in ("result", "d hidden_TD")}
        whole |= {name: torch.cat([part[name] for part in parts]) for name in ("result", "d hidden_TD")}
        for name, exact in truth.items():
            assert_as_exact(whole[name], alone[name], exact, FLOORS[torch.float32], name)


def exchange_there_and_back(degree: int, slices: tuple[int, ...]) -> bool:
    with joined(ParallelConfig(sequence=degree), CPU) as world:  # type: ignore[arg-type]
        exchange = HeadExchange(world.sequence_group, slices)  # type: ignore[arg-type]
        start = sum(slices[: world.rank])
        whole = torch.arange(sum(slices) * 4 * 3.0).view(sum(slices), 4, 3)
        mine = whole[start : start + slices[world.rank]]
        own, twice = heads_of_all_tokens([mine, 2 * mine.repeat_interleave(2, dim=1)], exchange)
        width = 4 // degree
        there = torch.equal(own, whole[:, world.rank * width : (world.rank + 1) * width])
        back, twice_back = all_heads_of_tokens([own, twice], exchange)
        with pytest.raises(ValueError, match=r"6 heads cannot be shared evenly by 4 ranks|got 1 tokens; the slice of rank"):
            need_exchange("test", exchange, exchange.num_tokens if degree == 4 else 1, 6)
        return there and torch.equal(back, mine) and torch.equal(twice_back, 2 * mine.repeat_interleave(2, dim=1))


@pytest.mark.parametrize(("degree", "slices"), [(2, (3, 4)), (4, (0, 2, 5, 0))], ids=["two", "some have no token"])
def test_what_goes_there_comes_back_whatever_the_slices(degree: int, slices: tuple[int, ...]) -> None:
    assert all(on_ranks(degree, exchange_there_and_back, degree, slices))


def test_keys_and_values_are_repeated_as_often_as_needed() -> None:
    assert [repeats_for(heads, ranks) for heads, ranks in ((8, 8), (8, 4), (2, 8), (3, 2), (6, 4))] == [1, 1, 4, 2, 2]
