"""The head: the loss and gradients of torch's cross-entropy on whole logits, without ever holding them whole."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from structcot_kernels import linear_cross_entropy
from structcot_kernels.linear_cross_entropy import Made, forward_in_chunks, scale_rows
from tests.one_step import REORDERED, ROUNDED, relative_error

HEAD = importlib.import_module("structcot_kernels.linear_cross_entropy")  # the package's attribute of that name is the function
SIZES = {"rows": 53, "hidden": 24, "vocabulary": 301}


@pytest.mark.parametrize("rows_at_once", [1, 10, 53, 1000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0], ids=["flat", "usual", "sure"])
def test_sum_rows_and_gradients_are_those_of_cross_entropy_in_fp64(
    spread: float, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEAD, "TORCH_CHUNK_ELEMENTS", rows_at_once * SIZES["vocabulary"])
    monkeypatch.setattr(HEAD, "CACHED_ELEMENTS", 7 * SIZES["vocabulary"])
    hidden_MD, weight_VD, labels_M = inputs(spread)
    loss_sum, losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    loss_sum.backward()

    wide_MD, wide_VD = (tensor.detach().double().requires_grad_() for tensor in (hidden_MD, weight_VD))
    wanted_M = F.cross_entropy(wide_MD @ wide_VD.T, labels_M, reduction="none")
    wanted_M.sum().backward()
    assert loss_sum.dtype == losses_M.dtype == torch.float32
    assert relative_error(loss_sum, wanted_M.sum()) <= ROUNDED
    assert relative_error(losses_M, wanted_M) <= ROUNDED
    assert relative_error(hidden_MD.grad, wide_MD.grad) <= ROUNDED
    assert relative_error(weight_VD.grad, wide_VD.grad) <= ROUNDED


@pytest.mark.parametrize("num_labels", [1.0, 53.0, 1e6])
def test_a_loss_divided_afterwards_divides_the_gradients(num_labels: float) -> None:
    hidden_MD, weight_VD, labels_M = inputs()
    whole = torch.autograd.grad(linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0], (hidden_MD, weight_VD))
    divided = torch.autograd.grad(linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0] / num_labels, (hidden_MD, weight_VD))
    for one, other in zip(whole, divided, strict=True):
        assert relative_error(other * num_labels, one) <= REORDERED


def test_no_row_gives_exactly_zero_with_a_graph_and_zero_gradients() -> None:
    hidden_MD, weight_VD, labels_M = inputs(rows=0)
    loss_sum, losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    assert loss_sum.item() == 0.0
    assert losses_M.shape == (0,)
    loss_sum.backward()
    assert hidden_MD.grad is not None
    assert hidden_MD.grad.shape == (0, SIZES["hidden"])
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()


@pytest.mark.parametrize(("hidden_trained", "weight_trained"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_gets_no_gradient_and_no_memory_for_one(
    hidden_trained: bool, weight_trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEAD, "TORCH_CHUNK_ELEMENTS", 8 * SIZES["vocabulary"])
    hidden_MD, weight_VD, labels_M = inputs()
    wanted = linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0]
    whole = torch.autograd.grad(wanted, (hidden_MD, weight_VD))
    hidden_MD.requires_grad_(hidden_trained)
    weight_VD.requires_grad_(weight_trained)
    loss_sum, _ = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    _, biggest = watched(hidden_MD, weight_VD, labels_M)
    assert loss_sum.item() == wanted.item()
    assert loss_sum.requires_grad == (hidden_trained or weight_trained)
    assert (tuple(weight_VD.shape) in biggest.shapes) == weight_trained
    assert (tuple(hidden_MD.shape) in biggest.shapes) == hidden_trained
    if loss_sum.requires_grad:
        loss_sum.backward()
    for tensor, gradient, is_trained in zip((hidden_MD, weight_VD), whole, (hidden_trained, weight_trained), strict=True):
        assert torch.equal(tensor.grad, gradient) if is_trained else tensor.grad is None


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 8 * SIZES["vocabulary"]
    monkeypatch.setattr(HEAD, "TORCH_CHUNK_ELEMENTS", chunk)
    hidden_MD, weight_VD, labels_M = inputs(rows=400)
    weight_VD.requires_grad_(False)
    made, biggest = watched(hidden_MD, weight_VD, labels_M)
    with biggest:
        scale_rows(made.grad_hidden_MD, made.scale_M, torch.ones(()), torch.float32)
    assert biggest.elements == max(chunk, hidden_MD.numel())
    assert biggest.elements < 400 * SIZES["vocabulary"] / 10


def test_nothing_of_the_logits_is_kept_for_the_backward() -> None:
    hidden_MD, weight_VD, labels_M = inputs()
    weight_VD.requires_grad_(False)
    loss_sum, losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    kept = [tensor for tensor in loss_sum.grad_fn.saved_tensors if tensor.numel()]  # type: ignore[union-attr]
    assert [tuple(tensor.shape) for tensor in kept] == [tuple(hidden_MD.shape), tuple(losses_M.shape)]
    assert not losses_M.requires_grad


def test_bf16_inputs_give_fp32_losses_and_gradients_of_their_own_dtypes() -> None:
    hidden_MD, weight_VD, labels_M = inputs()
    narrow_MD = hidden_MD.detach().bfloat16().requires_grad_()
    loss_sum, losses_M = linear_cross_entropy(narrow_MD, weight_VD, labels_M)
    loss_sum.backward()
    assert loss_sum.dtype == losses_M.dtype == torch.float32
    assert narrow_MD.grad is not None
    assert (narrow_MD.grad.dtype, weight_VD.grad.dtype) == (torch.bfloat16, torch.float32)
    wanted = F.cross_entropy(narrow_MD.detach().float() @ weight_VD.detach().bfloat16().float().T, labels_M, reduction="none")
    # Logits come out of the product in bf16, with 8 bits; the sum over the vocabulary is taken in fp32.
    assert relative_error(losses_M, wanted) <= 2**-8


def test_an_infinite_logit_shows_in_the_loss_of_its_row_alone() -> None:
    hidden_MD, weight_VD, labels_M = inputs()
    with torch.no_grad():
        hidden_MD[7] = float("inf")
    _, losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    assert (~losses_M.isfinite()).nonzero().flatten().tolist() == [7]


def test_the_backward_fills_no_zeros_of_the_size_of_a_gradient() -> None:
    loss_sum, _ = linear_cross_entropy(*inputs())
    with OperatorNames() as names:
        loss_sum.backward()
    assert "structcot.linear_cross_entropy_backward.default" in names.seen
    assert not [name for name in names.seen if "zero" in name or "full" in name]


class OperatorNames(TorchDispatchMode):
    """Notes the name of every operator that runs while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class BiggestTensor(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes while it is on, views of what is there already left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.shapes = 0, set[tuple[int, ...]]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not function.is_view:
                self.elements = max(self.elements, tensor.numel())
                self.shapes.add(tuple(tensor.shape))
        return result


def watched(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> tuple[Made, BiggestTensor]:
    """The forward, run inside the operator's one node, where a mode sees each tensor."""
    needs = (hidden_MD.requires_grad, weight_VD.requires_grad)
    with BiggestTensor() as biggest:
        made = forward_in_chunks(hidden_MD.detach(), weight_VD.detach(), labels_M, *needs)
    return made, biggest


def inputs(spread: float = 1.0, rows: int = SIZES["rows"]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight and labels; logits have the standard deviation `spread`."""
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(rows, SIZES["hidden"], generator=generator)
    weight_VD = torch.randn(SIZES["vocabulary"], SIZES["hidden"], generator=generator) * spread / SIZES["hidden"] ** 0.5
    labels_M = torch.randint(0, SIZES["vocabulary"], (rows,), generator=generator)
    return hidden_MD.requires_grad_(), weight_VD.requires_grad_(), labels_M
