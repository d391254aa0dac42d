"""The head's loss: as exact as PyTorch, and exact where PyTorch is not, for any loss, chunk and label; memory, work and bytes counted."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from structcot_kernels import linear_cross_entropy, reference
from structcot_kernels._cost import COSTS, matmul_cost
from structcot_kernels.jit import linear_cross_entropy as jit
from structcot_kernels.launch import recorded_launches, use_backend
from structcot_kernels.linear_cross_entropy import forward_in_chunks, linear_cross_entropy_backward, linear_cross_entropy_forward
from tests.kernels.parity import DTYPES, assert_as_exact, assert_parity, frobenius_error, random

HEAD = importlib.import_module("structcot_kernels.linear_cross_entropy")  # the package's attribute of that name is the function
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
QWEN_32B = {"num_rows": 16384, "num_columns": 152064, "inner": 5120}


def operands(num_rows: int, num_columns: int, inner: int, dtype: torch.dtype, device, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weight and labels, the first and the last column among them; logits have the standard deviation `spread`."""
    hidden_MD = random(num_rows, inner, dtype=dtype, device=device)
    weight_VD = random(num_columns, inner, dtype=dtype, seed=1, scale=spread * inner**-0.5, device=device)
    labels_M = torch.randint(0, num_columns, (num_rows,), generator=torch.Generator().manual_seed(2))
    labels_M[:1], labels_M[1:2] = num_columns - 1, 0
    return hidden_MD, weight_VD, labels_M.to(device)


def rows_of_every_loss(dtype: torch.dtype, device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose losses go from below 1e-6 to beyond 100: hidden lies along the row of the weight that belongs to the label, or against."""
    _, weight_VD, labels_M = operands(140, 601, 128, dtype, device, spread=128**0.5)
    logits_M = torch.cat([torch.linspace(-180.0, 24.0, 120), torch.linspace(4.0, 10.0, 20)])[torch.randperm(140)].to(device)
    directions_MD = F.normalize(weight_VD.detach().float()[labels_M], dim=1)
    length_M = weight_VD.detach().float()[labels_M].norm(dim=1)
    hidden_MD = (directions_MD * (logits_M / length_M).unsqueeze(1)).to(dtype)
    return hidden_MD.requires_grad_(), weight_VD, labels_M


# Values


@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 63, 5), (5, 40, 1100), (130, 301, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_are_as_exact_as_pytorch(dtype: torch.dtype, shape: tuple, spread: float, device, backend: str) -> None:
    tensors = operands(*shape, dtype, device, spread)
    assert_parity(linear_cross_entropy, reference.linear_cross_entropy, tensors, ["sum", "losses", "grad hidden", "grad weight"])


def test_more_row_blocks_than_share_a_block_of_the_weight(device) -> None:
    tensors = operands(64 * jit.GROUP.value + 10, 200, 8, torch.float32, device)
    assert_parity(linear_cross_entropy, reference.linear_cross_entropy, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_is_exact_by_itself_however_sure_or_wrong_the_model_is(dtype: torch.dtype, device) -> None:
    hidden_MD, weight_VD, labels_M = rows_of_every_loss(dtype, device)
    wide_MD = hidden_MD.detach().double().requires_grad_()
    exact_sum, exact_M = reference.linear_cross_entropy(wide_MD, weight_VD.detach().double(), labels_M)
    exact_sum.backward()
    loss_sum, losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    loss_sum.backward()
    assert exact_M.min() < 1e-6
    assert exact_M.max() > 100.0
    assert ((exact_M > 0.1) & (exact_M < 1.0)).sum() >= 3
    assert ((losses_M - exact_M).abs() / exact_M).max() <= 1e-5
    row_errors_M = (hidden_MD.grad.double() - wide_MD.grad).norm(dim=1) / wide_MD.grad.norm(dim=1)
    if dtype == torch.float16:  # which holds no gradient below 6e-8, and few digits of one below 6e-5
        row_errors_M = row_errors_M[exact_M > 0.01]
    # Exponentials and the product are rounded, then the row's factor is applied; fp32 holds exponents near 200 to 1.5e-5 at best.
    assert row_errors_M.max() <= 4 * ROUNDING[dtype] + 2e-5
    assert frobenius_error(weight_VD.grad, weight_grad(hidden_MD, weight_VD, labels_M)) <= 4 * ROUNDING[dtype] + 2e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flat_rows_of_many_columns_stay_in_range_even_where_the_label_is_the_likeliest(dtype: torch.dtype, device) -> None:
    hidden_MD, weight_VD, _ = operands(5, 2500, 16, dtype, device, spread=0.5)
    labels_M = (hidden_MD.detach() @ weight_VD.detach().T).argmax(1)
    assert_parity(linear_cross_entropy, reference.linear_cross_entropy, (hidden_MD, weight_VD, labels_M))


def test_the_logarithm_keeps_its_digits(device, backend: str) -> None:
    # Logits that are inputs hold no error of a product; what is left is that of the exponent's rounding, 1e-6 for exp(-16).
    hidden_M1 = torch.cat([torch.linspace(-16.0, 3.0, 150), torch.linspace(-1.0, 1.0, 50)]).unsqueeze(1).to(device)
    weight_21 = torch.tensor([[0.0], [1.0]], device=device)
    _, losses_M = linear_cross_entropy(hidden_M1, weight_21, torch.zeros(200, dtype=torch.int64, device=device))
    exact_M = hidden_M1.squeeze(1).double().exp().log1p()
    assert ((losses_M - exact_M).abs() / exact_M).max() <= 2e-6


def weight_grad(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
    wide_VD = weight_VD.detach().double().requires_grad_()
    reference.linear_cross_entropy(hidden_MD.detach().double(), wide_VD, labels_M)[0].backward()
    return wide_VD.grad  # type: ignore[return-value]


def test_pytorch_on_a_cpu_keeps_the_digits_of_a_sure_token_in_fp32(device) -> None:
    use_backend("torch")
    hidden_MD, weight_VD, labels_M = (tensor.detach() for tensor in rows_of_every_loss(torch.float32, device))
    _, exact_M = reference.linear_cross_entropy(hidden_MD.double(), weight_VD.double(), labels_M)
    _, losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    assert ((losses_M - exact_M).abs() / exact_M).max() <= 1e-5


def test_an_fp32_master_is_rounded_once_and_gets_an_fp32_gradient(device, backend: str) -> None:
    hidden_MD, _, labels_M = operands(70, 301, 33, torch.bfloat16, device)
    _, master_VD, _ = operands(70, 301, 33, torch.float32, device)
    rounded_VD = master_VD.detach().bfloat16().requires_grad_()
    ours, other = (linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0] for weight_VD in (master_VD, rounded_VD))
    assert torch.equal(ours, other)
    ours.backward()
    other.backward()
    assert (master_VD.grad.dtype, rounded_VD.grad.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(master_VD.grad.bfloat16(), rounded_VD.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_nothing_and_a_run_repeats_bit_for_bit(dtype: torch.dtype, device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands(300, 301, 40, dtype, device)

    def results() -> list[Tensor]:
        loss_sum, losses_M = linear_cross_entropy(*tensors)
        return [loss_sum, losses_M, *torch.autograd.grad(loss_sum, tensors[:2])]

    whole, again = results(), results()
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    monkeypatch.setattr(HEAD, "CHUNK_BYTES", 1)
    assert HEAD.kernel_chunk(301, 2) == 128
    # The 300 terms of an element of the weight's gradient are added up in another order: one after another they are off by a random walk of
    # as many roundings, and libraries differ in how many sums they keep side by side (below 4 roundings on one processor, 4.7 on another).
    roundings = 300**0.5 / 2 if dtype == torch.float32 else 4
    for one, other in zip(whole, results(), strict=True):
        assert frobenius_error(other.detach(), one.detach()) <= roundings * ROUNDING[dtype]


def test_no_output_is_left_unwritten(device) -> None:
    tensors = operands(70, 301, 40, torch.bfloat16, device)
    plain = forward_in_chunks(*(tensor.detach() for tensor in tensors), True, True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = forward_in_chunks(*(tensor.detach() for tensor in tensors), True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(plain, poisoned, strict=True))


def test_strided_operands_are_read_where_they_lie(device, backend: str) -> None:
    hidden_MD, weight_VD, labels_M = (tensor.detach() for tensor in operands(140, 301, 48, torch.float32, device))
    strided = (hidden_MD[::2, 8:40], weight_VD[:, 8:40], labels_M[::2])
    gradients = []
    for tensors in (strided, tuple(tensor.contiguous() for tensor in strided)):
        leaves = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors]
        gradients.append(torch.autograd.grad(linear_cross_entropy(*leaves)[0], leaves[:2]))
    for one, other in zip(*gradients, strict=True):
        assert frobenius_error(one, other) <= 1e-6


# What is needed, and what is not


@pytest.mark.parametrize(("trains_hidden", "trains_weight"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(trains_hidden: bool, trains_weight: bool, device, backend: str) -> None:
    hidden_MD, weight_VD, labels_M = operands(70, 301, 33, torch.bfloat16, device)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0], (hidden_MD, weight_VD))
    exact = linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0]
    hidden_MD.requires_grad_(trains_hidden)
    weight_VD.requires_grad_(trains_weight)
    loss_sum, losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    assert torch.equal(loss_sum, exact)
    assert not losses_M.requires_grad
    assert loss_sum.requires_grad == (trains_hidden or trains_weight)
    if loss_sum.requires_grad:
        loss_sum.backward()
    for tensor, gradient, is_trained in zip((hidden_MD, weight_VD), wanted, (trains_hidden, trains_weight), strict=True):
        assert torch.equal(tensor.grad, gradient) if is_trained else tensor.grad is None


def test_no_rows_give_exactly_zero_with_a_graph(device, backend: str) -> None:
    hidden_MD, weight_VD, labels_M = operands(0, 301, 33, torch.bfloat16, device)
    loss_sum, losses_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M)
    assert loss_sum.item() == 0.0
    assert losses_M.shape == (0,)
    loss_sum.backward()
    assert hidden_MD.grad.shape == (0, 33)
    assert not weight_VD.grad.any()


# Bad input


@pytest.mark.parametrize("label", [-1, -100, 301, 2**40])
def test_a_label_outside_the_vocabulary_reads_nothing_and_shows_in_its_row_alone(label: int, device) -> None:
    hidden_MD, weight_VD, labels_M = operands(9, 301, 33, torch.bfloat16, device)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0], hidden_MD)[0]
    labels_M[4] = label
    loss_sum, losses_M = linear_cross_entropy(hidden_MD, weight_VD.detach(), labels_M)
    (gradient,) = torch.autograd.grad(loss_sum, hidden_MD)
    assert losses_M.isnan().nonzero().flatten().tolist() == [4]
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [4]
    others = torch.arange(9, device=device) != 4
    assert torch.equal(gradient[others], wanted[others])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU a wrong label is an assertion of the device")
@pytest.mark.parametrize("label", [-1, 301])
def test_pytorch_on_a_cpu_refuses_such_a_label(label: int) -> None:
    use_backend("torch")
    hidden_MD, weight_VD, labels_M = operands(9, 301, 33, torch.float32, "cpu")
    labels_M[4] = label
    with pytest.raises(ValueError, match=rf"labels_M holds {label}; labels must lie in \[0, 301\)"):
        linear_cross_entropy(hidden_MD, weight_VD, labels_M)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinite_logit_shows_in_its_row_alone(value: float, device, backend: str) -> None:
    hidden_MD, weight_VD, labels_M = operands(9, 301, 33, torch.float32, device)
    with torch.no_grad():
        hidden_MD[7] = value
    loss_sum, losses_M = linear_cross_entropy(hidden_MD, weight_VD.detach(), labels_M)
    (gradient,) = torch.autograd.grad(loss_sum, hidden_MD)
    assert (~losses_M.isfinite()).nonzero().flatten().tolist() == [7]
    assert (~gradient.isfinite()).any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": (301, 32)}, ValueError, r"weight_VD has shape \(301, 32\); it must be \(any, 33\)"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, ValueError, r"labels_M has shape \(8,\); it must be \(9\)"),
        ({"labels": torch.zeros(9, dtype=torch.int32)}, TypeError, r"labels_M is torch.int32; it must be torch.int64"),
        ({"dtype": torch.float64}, TypeError, r"got torch.float64"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes: dict, error: type, words: str) -> None:
    hidden_MD = torch.zeros(9, 33, dtype=changes.get("dtype", torch.float32))
    weight_VD = torch.zeros(changes.get("weight", (301, 33)))
    with pytest.raises(error, match=words):
        linear_cross_entropy(hidden_MD, weight_VD, changes.get("labels", torch.zeros(9, dtype=torch.int64)))


def test_operands_that_lie_elsewhere_or_askew_are_refused() -> None:
    hidden_MD, labels_M = torch.zeros(9, 33), torch.zeros(9, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight_VD has strides \(1, 301\); its last one must be 1"):
        linear_cross_entropy(hidden_MD, torch.zeros(33, 301).T, labels_M)
    with pytest.raises(ValueError, match=r"labels_M lies on meta; it must lie on cpu, as hidden_MD does"):
        HEAD.need_operands(hidden_MD, torch.zeros(301, 33), labels_M.to("meta"))


# Sizes


def test_offsets_beyond_32_bits(device) -> None:
    hidden_MD, weight_VD, labels_M = (tensor.detach() for tensor in operands(3, 301, 33, torch.bfloat16, device))
    stride = 2**30
    try:
        # The first half is never touched: there 32-bit offsets of the third row would end.
        memory = torch.empty(2**31 + 2 * stride + 301, dtype=torch.bfloat16, device=device)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("8.6 GB of address space are not to be had here")
    exp_MV, (losses_M, scale_M) = memory.as_strided((3, 301), (stride, 1), 2**31), torch.empty(2, 3, device=device)
    jit.exponentials(hidden_MD, weight_VD, labels_M, exp_MV, losses_M, scale_M)
    logits_MV = hidden_MD.double() @ weight_VD.double().T
    wanted_MV = logits_MV.softmax(1) - F.one_hot(labels_M, 301)
    assert frobenius_error(exp_MV * scale_M.unsqueeze(1), wanted_MV) <= 2 * ROUNDING[torch.bfloat16]


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it, those without memory too, take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        if isinstance(result, Tensor) and not any(isinstance(arg, Tensor) for arg in args if function.is_view):
            storage = result.untyped_storage()
            self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def tensors_without_memory() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weight and labels of 16,384 tokens of Qwen2.5-32B."""
    num_rows, num_columns, inner = QWEN_32B.values()
    hidden_MD, weight_VD = (torch.empty(size, inner, dtype=torch.bfloat16, device="meta") for size in (num_rows, num_columns))
    return hidden_MD, weight_VD, torch.empty(num_rows, dtype=torch.int64, device="meta")


def test_the_head_of_the_32b_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_MD, weight_VD, labels_M = tensors_without_memory()
    monkeypatch.setattr(jit, "launch", lambda *args, **meta: None)  # a recorded launch would keep its tensors
    with LiveBytes() as live:
        made = forward_in_chunks(hidden_MD, weight_VD, labels_M, True, False)
    beyond = live.peak - 2 * made.grad_hidden_MD.numel()
    exponentials = 2 * HEAD.kernel_chunk(QWEN_32B["num_columns"], 2) * QWEN_32B["num_columns"]
    assert exponentials <= beyond <= 1.5e9
    with LiveBytes() as live:
        forward_in_chunks(hidden_MD, weight_VD, labels_M, False, False)
    assert live.peak <= 0.03e9


def test_the_head_of_the_32b_takes_little_arithmetic_and_launches_no_more_than_four_chunks_need() -> None:
    tensors = tensors_without_memory()
    num_rows, num_columns, inner = QWEN_32B.values()
    work = num_rows * num_columns * inner
    for needs, products in (((False, False), 2), ((True, False), 4), ((True, True), 6)):
        costs = COSTS[linear_cross_entropy_forward._opoverload](*tensors, *needs)
        assert products <= sum(cost.flops for cost in costs) / work <= 1.05 * products
    with recorded_launches() as launches:
        forward_in_chunks(*tensors, True, False)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["target_kernel", "exp_kernel", "row_kernel", "repair_kernel"] * 4


# Cost and registration


@pytest.mark.parametrize("needs", [(False, False), (True, False), (True, True)], ids=["loss", "frozen head", "trained head"])
@pytest.mark.parametrize("shape", [(70, 300, 100), (150, 601, 1030)], ids=str)
def test_bytes_moved_are_those_of_the_formula(shape: tuple, needs: tuple, traffic) -> None:
    hidden_MD, weight_VD, labels_M = (tensor.detach() for tensor in operands(*shape, torch.bfloat16, "cpu"))
    num_rows, num_columns, inner = shape
    library = 0.0  # products and the sum that they are added to, which no kernel of ours touches
    if needs[0]:
        library += matmul_cost(num_rows, inner, num_columns, 2).bytes
    if needs[1]:
        library += 2 * num_rows * (num_columns + inner) + 12 * num_columns * inner
    costs = COSTS[linear_cross_entropy_forward._opoverload](hidden_MD, weight_VD, labels_M, *needs)
    with traffic() as counted:
        _, _, *made = linear_cross_entropy_forward(hidden_MD, weight_VD, labels_M, *needs)
    assert counted.loaded + counted.stored == sum(cost.bytes + cost.cached_bytes for cost in costs) - library
    backward = (torch.ones(()), *made, torch.bfloat16)
    costs = COSTS[linear_cross_entropy_backward._opoverload](*backward)
    with traffic() as counted:
        linear_cross_entropy_backward(*backward)
    assert counted.loaded + counted.stored == sum(cost.bytes + cost.cached_bytes for cost in costs)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (True, True)], ids=["loss", "frozen head", "trained head"])
def test_operators_are_registered_soundly(needs: tuple[bool, bool], device) -> None:
    hidden_MD, weight_VD, labels_M = operands(5, 70, 16, torch.float32, device)
    hidden_MD.requires_grad_(needs[0])
    weight_VD.requires_grad_(needs[1])
    torch.library.opcheck(linear_cross_entropy_forward, (hidden_MD, weight_VD, labels_M, *needs))
    _, _, *made = linear_cross_entropy_forward(hidden_MD.detach(), weight_VD.detach(), labels_M, *needs)
    torch.library.opcheck(linear_cross_entropy_backward, (torch.ones((), device=device), *made, torch.float32))


def test_compiled_it_is_one_node_with_a_cost(device) -> None:
    hidden_MD, weight_VD, labels_M = operands(5, 70, 16, torch.float32, device)
    graphs = []

    def note(graph, _):
        graphs.append(graph)
        return graph

    def loss(hidden_MD: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0] / 3

    wanted = torch.autograd.grad(loss(hidden_MD), (hidden_MD, weight_VD))
    torch.compile(loss, backend=note, fullgraph=True)(hidden_MD)
    (graph,) = graphs
    ours = [str(node.target) for node in graph.graph.nodes if "structcot" in str(node.target)]
    assert ours == ["structcot.linear_cross_entropy_forward.default"]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, torch.autograd.grad(compiled(hidden_MD), (hidden_MD, weight_VD)), wanted))
    with FlopCounterMode(display=False) as counter:
        loss(hidden_MD)
    assert 6 * 5 * 70 * 16 <= counter.get_total_flops() <= 1.2 * 6 * 5 * 70 * 16


# Beside others, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_is_as_exact_as_what_torch_and_liger_have(dtype: torch.dtype, device) -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden_MD, weight_VD, labels_M = operands(4096, 32000, 1024, dtype, device, spread=3.0)
    options = torch.nn.LinearCrossEntropyOptions()
    sides = {
        "torch": lambda h, w: F.linear_cross_entropy(h, w, labels_M, reduction="sum", options=options),
        "liger": lambda h, w: LigerFusedLinearCrossEntropyFunction.apply(h, w, labels_M, None, None, -100, 0.0, 0.0, "sum")[0],
    }
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_MD, weight_VD)]
    exact = gradients(reference.linear_cross_entropy(*wide, labels_M)[0], wide)
    ours = gradients(linear_cross_entropy(hidden_MD, weight_VD, labels_M)[0], [hidden_MD, weight_VD])
    for name, side in sides.items():
        theirs = gradients(side(hidden_MD, weight_VD), [hidden_MD, weight_VD])
        for our, other, truth, what in zip(ours, theirs, exact, ("sum", "grad hidden", "grad weight"), strict=True):
            assert_as_exact(our, other, truth, 2 * ROUNDING[dtype], f"{what} beside {name}")


def gradients(loss_sum: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The sum and its gradients."""
    return [loss_sum.detach(), *torch.autograd.grad(loss_sum, tensors)]
