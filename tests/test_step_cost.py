"""The step counter: what each operator is taken to cost, which kind of work it is, what is kept, and what a step of the 32B comes to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bench import step_cost, step_sides
from bench.step_cost import FEWER_LAYERS, MORE_LAYERS, OURS, PEER
from bench.step_sides import KINDS, QWEN2_5_32B, Setting, Work
from structcot.config import TuningConfig
from structcot.counting import SavedBytes, Tally
from structcot.flops import step_flops
from structcot_kernels import rms_norm
from structcot_kernels.launch import backend

T, K, N = 64, 32, 48  # tokens, inputs and outputs of small products
LONG, SHORT = (Setting(tokens=tokens, document=4096, rank=64, recompute="block") for tokens in (16384, 4096))
count_ours, count_peer = cache(step_sides.count_ours), cache(step_sides.count_peer)  # tests share what is counted
LAYER_WEIGHTS = QWEN2_5_32B.body_matmul_parameters / QWEN2_5_32B.num_layers


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def costs(run: Callable[[], Any]) -> list[tuple[float, float]]:
    """Operations and bytes of each kernel that `run` would launch."""
    with Tally(lambda *_: "any") as tally:
        run()
    return [(kernel.cost.flops, kernel.cost.bytes) for kernel in tally.kernels]


# Each operator


def test_a_product_reads_both_sides_and_writes_the_result() -> None:
    x_TK, weight_NK = empty(T, K), empty(N, K)
    wanted = [(2.0 * T * K * N, 2 * (T * K + K * N + T * N))]
    assert costs(lambda: x_TK @ weight_NK.T) == wanted
    assert costs(lambda: torch.mm(x_TK, weight_NK.T, out=empty(T, N))) == wanted
    assert costs(lambda: torch.bmm(x_TK.unsqueeze(0), weight_NK.T.unsqueeze(0))) == wanted


def test_a_bias_is_read_in_the_product_and_a_matrix_copied_before_it() -> None:
    x_TK, weight_KN, bias_N, out_TN = empty(T, K), empty(K, N), empty(N), empty(T, N)
    flops, product = 2.0 * T * K * N, 2 * (T * K + K * N + T * N)
    assert costs(lambda: torch.addmm(bias_N, x_TK, weight_KN)) == [(flops, product + 2 * N)]
    assert costs(lambda: torch.addmm(out_TN, x_TK, weight_KN)) == [(0.0, 2 * 2 * T * N), (flops, product + 2 * T * N)]
    assert costs(lambda: torch.addmm(bias_N, x_TK, weight_KN, out=empty(T, 2 * N)[:, :N])) == [
        (0.0, 2 * (N + T * N)),
        (flops, product + 2 * T * N),
    ]
    in_place = [(flops, product + 2 * T * N)]
    assert costs(lambda: out_TN.addmm_(x_TK, weight_KN)) == in_place
    assert costs(lambda: torch.addmm(out_TN, x_TK, weight_KN, out=out_TN)) == [(flops, product + 2 * T * N)]


def test_views_and_room_without_contents_cost_nothing() -> None:
    x_TK = empty(T, K)
    assert costs(lambda: (x_TK.T, x_TK[3:], x_TK.view(-1), x_TK.detach(), x_TK.unsqueeze(0).expand(5, T, K))) == []
    assert costs(lambda: (x_TK.split(8), x_TK.unflatten(1, (4, -1)), torch.ops.aten._unsafe_view(x_TK, [K, T]))) == []
    assert costs(lambda: (torch.empty_like(x_TK), x_TK.new_empty(3), empty(5))) == []


@pytest.mark.parametrize(
    ("run", "moved"),
    [
        (lambda x: x + x.clone(), [4 * T * K, 6 * T * K]),
        (lambda x: x * x, [4 * T * K]),
        (lambda x: x[:8] * x[8:16], [6 * 8 * K]),
        (lambda x: x * empty(1, K).expand(T, K), [4 * T * K + 2 * K]),
        (lambda x: x.float(), [6 * T * K]),
        (lambda x: x.mul_(2.0), [4 * T * K]),
        (lambda x: x.copy_(empty(T, K, dtype=torch.float32)), [6 * T * K]),
        (lambda x: x.zero_(), [2 * T * K]),
        (lambda x: torch.zeros_like(x), [2 * T * K]),
        (lambda x: torch.cat([x, x.clone(), x[:8]]), [4 * T * K, 2 * (2 * T * K + 8 * K) + 2 * (2 * T + 8) * K]),
        (lambda x: x.sum(0), [2 * T * K + 2 * K]),
        (lambda x: F.embedding(empty(7, dtype=torch.int64), x), [56 + 4 * 7 * K]),
        (lambda x: x[empty(7, dtype=torch.int64)], [56 + 4 * 7 * K]),
    ],
)
def test_what_moves_is_each_operand_and_result_once(run: Callable[[Tensor], object], moved: list[int]) -> None:
    x_TK = empty(T, K)
    assert [bytes_ for _, bytes_ in costs(lambda: run(x_TK))] == moved


def test_the_loss_reads_the_labels_columns_alone() -> None:
    log_probs_TK, labels_T = empty(T, K, dtype=torch.float32).requires_grad_(), empty(T, dtype=torch.int64)
    with Tally(lambda *_: "any") as tally:
        F.nll_loss(log_probs_TK, labels_T, reduction="sum").backward()
    moved = {kernel.operator: kernel.cost.bytes for kernel in tally.kernels}
    assert moved["aten.nll_loss_forward.default"] < 16 * T
    assert 4 * T * K <= moved["aten.nll_loss_backward.default"] < 4 * T * K + 16 * T


def test_an_operator_of_ours_costs_what_its_formula_says_and_one_without_is_refused() -> None:
    x_TK, weight_K = empty(T, K), empty(K)
    assert costs(lambda: rms_norm(x_TK, weight_K, 1e-6)) == [(4.0 * T * K, 4 * T * K + 2 * K + 4 * T)]

    @torch.library.custom_op("test_step_cost::unpriced", mutates_args=())
    def unpriced(x_TK: Tensor) -> Tensor:
        return x_TK.clone()

    unpriced.register_fake(torch.empty_like)
    with pytest.raises(ValueError, match=r"unpriced.*no cost formula"):
        costs(lambda: unpriced(x_TK))


def test_operations_of_products_are_those_of_flop_counter_mode() -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.SiLU(), nn.Linear(N, K)).to("meta")

    def step() -> None:
        model(torch.empty(T, K, device="meta")).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    with Tally(lambda operator, *_: "product" if "mm" in str(operator) else "rest") as tally:
        step()
    assert sum(kernel.cost.flops for kernel in tally.kernels if kernel.kind == "product") == counter.get_total_flops() > 0


# Whose work it is


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1.0).exp()


@pytest.mark.parametrize("replayed", [False, True])
def test_the_backward_belongs_to_the_module_of_its_forward(replayed: bool) -> None:
    model = nn.Sequential(Scale(), Shift())
    x_TK = torch.empty(T, K, device="meta", requires_grad=True)
    with Tally(lambda operator, tensors, module: type(module).__name__) as tally:
        out = checkpoint(model, x_TK, use_reentrant=False) if replayed else model(x_TK)
        out.backward(torch.empty_like(out))
    work = [(kernel.kind, kernel.operator.split(".")[1]) for kernel in tally.kernels]
    forward = [("Scale", "mul"), ("Shift", "add"), ("Shift", "exp")]
    assert work == [*forward, *(forward if replayed else []), ("Shift", "mul"), ("Scale", "mul")]


def test_a_tally_leaves_no_hooks_behind_even_after_an_error() -> None:
    seen: list[object] = []

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    def note(operator: object, tensors: object, module: nn.Module | None) -> str:
        seen.append(module)
        return "any"

    hooks = [len(hooks) for hooks in (_global_forward_pre_hooks, _global_forward_hooks)]
    tally = Tally(note)
    x_TK = empty(T, K)
    with tally:
        with pytest.raises(ArithmeticError):
            Broken()(x_TK)
        x_TK + 1.0
    assert seen == [None]
    assert [len(hooks) for hooks in (_global_forward_pre_hooks, _global_forward_hooks)] == hooks


# What is kept


def test_saved_bytes_are_storages_without_parameters() -> None:
    model = nn.Linear(K, N, bias=False, device="meta", dtype=torch.bfloat16)
    x_TK, y_TN = empty(T, K).requires_grad_(), empty(T, N)
    saved = SavedBytes(model)
    with saved:
        out_TN = model(x_TK)
        (out_TN * y_TN + out_TN * y_TN[:]).exp()
    assert saved.total == 2 * (T * K + T * N + T * N), "x, y once for both products, and the exponential; not the weight"


def test_of_a_checkpoint_the_inputs_are_saved() -> None:
    model = nn.Sequential(Scale(), Shift(), Shift())
    x_TK = torch.empty(T, K, device="meta", requires_grad=True)
    saved = SavedBytes(model)
    with saved:
        out = checkpoint(model, x_TK, use_reentrant=False)
    out.backward(torch.empty_like(out))
    assert saved.total == 4 * T * K


# A step of the 32B


def seconds_of_ours(setting: Setting) -> float:
    return step_cost.step_cost(count_ours, setting).total.seconds


@pytest.mark.parametrize("side", [count_ours, count_peer])
def test_layers_lie_on_a_line(side: step_cost.Side) -> None:
    three, line = side(SHORT, 3), step_cost.step_cost(side, SHORT, 3)
    assert MORE_LAYERS < 3
    assert line.saved_bytes == pytest.approx(three.saved_bytes, rel=1e-12)
    for kind in KINDS:
        assert line.kinds[kind] == pytest.approx(three.kinds[kind], rel=1e-9), kind


def one_more_layer(side: step_cost.Side, setting: Setting, kind: str) -> Work:
    """What one more layer adds to a kind of work."""
    few, more = (side(setting, layers).kinds[kind] for layers in (FEWER_LAYERS, MORE_LAYERS))
    return Work(*((high - low) / (MORE_LAYERS - FEWER_LAYERS) for low, high in zip(few, more, strict=True)))


def test_frozen_products_run_as_often_as_each_side_recomputes() -> None:
    shapes = QWEN2_5_32B.projection_shapes
    replayed = sum(shapes[name][0] * shapes[name][1] for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    wanted = {
        (count_ours, "none"): 4 * LAYER_WEIGHTS,
        (count_ours, "block"): 4 * LAYER_WEIGHTS + 2 * replayed,
        (count_peer, "none"): 4 * LAYER_WEIGHTS,
        (count_peer, "full"): 6 * LAYER_WEIGHTS,
    }
    for (side, recompute), per_token in wanted.items():
        counted = one_more_layer(side, replace(SHORT, recompute=recompute), "frozen GEMM").flops
        assert counted == pytest.approx(per_token * SHORT.tokens, rel=1e-12), (side, recompute)


def test_both_sides_count_attention_by_one_formula() -> None:
    keeps_all = replace(SHORT, recompute="none")
    forward = 2.0 * SHORT.tokens * SHORT.document * QWEN2_5_32B.num_heads * QWEN2_5_32B.head_dim
    for side in (count_ours, count_peer):
        assert one_more_layer(side, keeps_all, "attention").flops == pytest.approx(3.5 * forward, rel=1e-12)
    assert one_more_layer(count_peer, replace(SHORT, recompute="full"), "attention").flops == pytest.approx(4.5 * forward, rel=1e-12)


@pytest.mark.parametrize("side", [count_ours, count_peer])
def test_the_head_is_multiplied_with_twice(side: step_cost.Side) -> None:
    once = 2.0 * SHORT.tokens * QWEN2_5_32B.head_matmul_parameters
    assert 2 * once * (1 - 1 / SHORT.document) <= side(SHORT, 1).kinds["head"].flops <= 2.1 * once


def test_eager_swiglu_moves_each_step_s_operands() -> None:
    """silu 2 and mul 3 tensors forward; two products and silu's own 3 each backward; without a replay."""
    counted = one_more_layer(count_peer, replace(SHORT, recompute="none"), "swiglu").bytes
    assert counted == pytest.approx(2 * (2 + 3 + 3 * 3) * SHORT.tokens * QWEN2_5_32B.intermediate_size)


def test_the_ideal_is_the_model_s_operations_with_attention_s_scores_made_twice() -> None:
    documents = [LONG.document] * (LONG.tokens // LONG.document)
    model = step_flops(QWEN2_5_32B, documents, LONG.tokens, TuningConfig(lora_r=LONG.rank), "none").model
    forward = 2.0 * LONG.tokens * LONG.document * QWEN2_5_32B.num_heads * QWEN2_5_32B.head_dim * QWEN2_5_32B.num_layers
    assert step_cost.ideal_flops(LONG) == pytest.approx(model + 0.5 * forward, rel=1e-12)


def test_peft_s_adapters_move_what_its_formula_says() -> None:
    """2 in + 12 out forward and 10 in + 8 out backward, beside the low-rank matrices: result + lora_B(lora_A(x)) * scaling, not fused."""
    outputs, inputs = (sum(shape[side] for shape in QWEN2_5_32B.projection_shapes.values()) for side in (0, 1))
    added = step_cost.lora_bytes(count_peer, LONG)["bytes_per_token_and_layer"]
    assert 12 * inputs + 20 * outputs < added < 1.01 * (12 * inputs + 20 * outputs)
    at_work = one_more_layer(count_peer, replace(LONG, recompute="none"), "low-rank").bytes / LONG.tokens
    sums = 6 * inputs  # of the gradients of x, which autograd adds up between operators
    assert added - at_work == pytest.approx(sums, rel=1e-3)


def test_counting_leaves_the_choice_of_backend_alone() -> None:
    before = backend()
    step_sides.count_ours(SHORT, 1)
    assert backend() == before


def test_saved_memory_is_what_the_blocks_promise() -> None:
    spec, hidden = QWEN2_5_32B, QWEN2_5_32B.hidden_size
    rank_bytes = 2 * 7 * SHORT.rank
    kept = {"full": 2 * 2 * hidden + rank_bytes}
    kept["block"] = kept["full"] + 2 * hidden + 4 * spec.num_heads
    few, more = (
        {recompute: count_ours(replace(SHORT, recompute=recompute), layers).saved_bytes for recompute in kept} for layers in (1, 2)
    )
    for recompute, per_token in kept.items():
        assert more[recompute] - few[recompute] == pytest.approx(per_token * SHORT.tokens, rel=1e-3), recompute


# The targets


def test_a_long_step_takes_at_most_two_thirds_of_transformers_and_peft() -> None:
    theirs = step_cost.step_cost(count_peer, replace(LONG, recompute="full"))
    assert seconds_of_ours(LONG) <= 0.68 * theirs.total.seconds


def test_a_long_step_recomputes_and_stays_near_the_ideal() -> None:
    assert seconds_of_ours(LONG) <= 1.45 * step_cost.ideal_flops(LONG) / step_cost.FLOPS_PER_SECOND


def test_a_short_step_keeps_everything_and_stays_nearer() -> None:
    setting = replace(SHORT, recompute="none")
    assert seconds_of_ours(setting) <= 1.15 * step_cost.ideal_flops(setting) / step_cost.FLOPS_PER_SECOND


def test_adapters_add_little_traffic_to_the_frozen_products() -> None:
    added = step_cost.lora_bytes(count_ours, LONG)
    assert added["share_of_frozen_products"] <= 0.06
    # Without adapters PyTorch copies the residual into the products of o and down, which counts for them; they need no such help.
    copies = 2 * 2 * 2 * QWEN2_5_32B.hidden_size
    assert added["share_of_frozen_products"] * (1 + copies / added["bytes_per_token_and_layer"]) <= 0.06


# The command


def test_the_command_prints_and_writes_the_same_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["step_cost", "--tokens", "512", "--document", "256", "--rank", "16", "--json", str(file)])
    step_cost.main()
    facts, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert facts["tokens"] == 512
    assert facts["rank"] == 16
    assert facts["sides"].keys() == {OURS, PEER, "ideal"}
    for name in (OURS, PEER):
        side = facts["sides"][name]
        assert list(side["kinds"]) == list(KINDS)
        assert side["seconds"] == pytest.approx(sum(work["seconds"] for work in side["kinds"].values()))
        assert f"{side['seconds']:9.3f}{facts['seconds_over'][PEER][name]:8.3f}{facts['seconds_over']['ideal'][name]:9.3f}" in printed
        assert f"{100 * facts['lora_bytes'][name]['share_of_frozen_products']:8.1f} %" in printed
    assert all(assumption.split()[0] in printed for assumption in facts["assumptions"])


@pytest.mark.parametrize("arguments", [["--tokens", "1000"], ["--tokens", "0"], ["--rank", "0"], ["--recompute", "some"]])
def test_what_makes_no_step_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["step_cost", *arguments])
    with pytest.raises(SystemExit, match="2"):
        step_cost.main()
    assert arguments[0] in capsys.readouterr().err
