"""Projections with adapters: as exact as PyTorch, alone and in groups, with every gradient; nothing kept but x and S."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structcot_kernels import Projection, lora_gate_up, lora_linear, lora_qkv, reference
from tests.kernels.blocks import T, keys
from tests.kernels.parity import DTYPES, assert_compile_sees_it_whole, assert_parity, random

K = 96


def parameters(num_outputs: int, rank: int, dtype: torch.dtype, device, seed: int = 0, trained: bool = False) -> list[Tensor]:
    """Weight, bias, A and B."""
    weight_NK = random(num_outputs, K, dtype=dtype, seed=seed, scale=K**-0.5, trained=trained, device=device)
    bias_N = random(num_outputs, dtype=dtype, seed=seed, trained=trained, device=device)
    lora_a_RK = random(rank, K, dtype=dtype, seed=seed, scale=K**-0.5, device=device)
    lora_b_NR = random(num_outputs, rank, dtype=dtype, seed=seed + 1, scale=0.3, device=device)
    return [weight_NK, bias_N, lora_a_RK, lora_b_NR]


@pytest.mark.parametrize("rank", [1, 16, 48, 512])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_projection_and_every_gradient(dtype: torch.dtype, dropout: float, rank: int, device, backend: str) -> None:
    x_TK = random(T, K, dtype=dtype, device=device)
    tensors = [x_TK, *parameters(40, rank, dtype, device, trained=rank == 16), keys(device)]
    ours, theirs = (
        lambda x, w, bias, a, b, key, operation=operation: operation(x, w, bias, a, b, 1.5, dropout, key)
        for operation in (lora_linear, reference.lora_linear)
    )
    assert_parity(ours, theirs, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qkv_with_bias_and_other_ranks_reads_x_once_and_equals_three_projections(dtype: torch.dtype, device, backend: str) -> None:
    shapes = [(64, 16), (24, 5), (24, 40)]
    group = [parameters(num_outputs, rank, dtype, device, seed) for seed, (num_outputs, rank) in enumerate(shapes)]

    def run(operation):
        def apply(x: Tensor, key: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return operation(x, *(Projection(*tensors[4 * i : 4 * i + 4], scale=1.0 + i) for i in range(3)), 0.1, key)

        return apply

    tensors = [random(T, K, dtype=dtype, device=device), keys(device), *(tensor for part in group for tensor in part)]
    assert_parity(run(lora_qkv), run(reference.lora_qkv), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_up_where_only_one_has_an_adapter(dtype: torch.dtype, device, backend: str) -> None:
    gate, up = (parameters(40, 8, dtype, device, seed) for seed in (0, 1))

    def run(operation):
        return lambda x, *tensors: operation(x, Projection(*tensors[:4], scale=2.0), Projection(tensors[4]))

    assert_parity(run(lora_gate_up), run(reference.lora_gate_up), [random(T, K, dtype=dtype, device=device), *gate, up[0]])


def test_without_adapter_it_is_a_plain_frozen_linear(device, backend: str) -> None:
    x_TK = random(T, K, dtype=torch.float32, device=device)
    weight_NK, bias_N, *_ = parameters(40, 1, torch.float32, device)
    out_TN = lora_linear(x_TK, weight_NK, bias_N)
    assert torch.equal(out_TN, torch.nn.functional.linear(x_TK, weight_NK, bias_N))
    out_TN.sum().backward()
    assert weight_NK.grad is None
    torch.testing.assert_close(x_TK.grad, weight_NK.sum(0).expand(T, K))


def test_fp32_masters_are_rounded_where_they_are_used_and_get_gradients_in_fp32(device, backend: str) -> None:
    x_TK = random(T, K, dtype=torch.bfloat16, device=device)
    masters = parameters(40, 16, torch.float32, device, trained=True)
    narrow = [master.detach().bfloat16().requires_grad_() for master in masters]
    out_TN, narrow_TN = lora_linear(x_TK, *masters, 2.0), lora_linear(x_TK, *narrow, 2.0)
    assert out_TN.dtype == torch.bfloat16
    assert torch.equal(out_TN, narrow_TN)
    out_TN.sum().backward()
    narrow_TN.sum().backward()
    for master, other in zip(masters, narrow, strict=True):
        assert master.grad is not None
        assert other.grad is not None
        assert (master.grad.dtype, other.grad.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(master.grad.bfloat16(), other.grad)


def test_nothing_is_kept_but_x_its_low_rank_image_and_the_parameters(device, backend: str) -> None:
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lora_linear(random(T, K, dtype=torch.float32, device=device), *parameters(40, 4, torch.float32, device), 1.0, 0.5, keys(device))
    assert sorted(kept) == sorted([(T, K), (T, 4), (T,), (40, K), (40,), (4, K), (40, 4)])


def test_two_runs_give_the_same_bits(device, backend: str) -> None:
    results = []
    for _ in range(2):
        x_TK, tensors = random(300, K, dtype=torch.bfloat16, device=device), parameters(40, 16, torch.bfloat16, device)
        lora_linear(x_TK, *tensors).square().sum().backward()
        results.append([x_TK.grad, tensors[2].grad, tensors[3].grad])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_leading_dimensions_may_be_many(device, backend: str) -> None:
    x_TK = random(12, K, dtype=torch.float32, device=device, trained=False)
    tensors = parameters(40, 4, torch.float32, device)
    assert torch.equal(lora_linear(x_TK.view(3, 4, K), *tensors), lora_linear(x_TK, *tensors).view(3, 4, 40))


def test_compile_sees_it_whole(device) -> None:
    tensors = [random(T, K, dtype=torch.float32, device=device), *parameters(40, 4, torch.float32, device)]
    assert_compile_sees_it_whole(lambda *tensors: lora_linear(*tensors, 2.0), tensors)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight_NK": (40, 95)}, ValueError, r"projection weight_NK has shape \(40, 95\); it must be \(any, 96\)"),
        ({"bias_N": (39,)}, ValueError, r"projection bias_N has shape \(39,\); it must be \(40\)"),
        ({"lora_a_RK": (4, 95)}, ValueError, r"projection lora_a_RK has shape \(4, 95\); it must be \(any, 96\)"),
        ({"lora_b_NR": (40, 5)}, ValueError, r"projection lora_b_NR has shape \(40, 5\); it must be \(40, 4\)"),
        ({"lora_b_NR": None}, ValueError, "projection has only one of lora_a_RK and lora_b_NR; give both or neither"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0; use a share of the inputs from 0 to below 1"),
        ({"dropout": 0.1}, ValueError, "there is dropout but dropout_keys_T is missing"),
        ({"x_TK": torch.int64}, TypeError, "got torch.int64; use float32, bfloat16 or float16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_that_do_not_fit_are_refused(change, error, words, device) -> None:
    names = ("weight_NK", "bias_N", "lora_a_RK", "lora_b_NR")
    arguments: dict[str, object] = dict(zip(names, parameters(40, 4, torch.float32, device), strict=True))
    arguments["x_TK"] = random(T, K, dtype=torch.float32, device=device, trained=False)
    for name, value in change.items():
        if isinstance(value, tuple):
            arguments[name] = random(*value, dtype=torch.float32, device=device)
        elif isinstance(value, torch.dtype):
            arguments[name] = arguments[name].to(value)  # type: ignore[attr-defined]
        else:
            arguments[name] = value
    with pytest.raises(error, match=words):
        lora_linear(**arguments)  # type: ignore[arg-type]
