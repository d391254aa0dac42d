"""Counted floating-point operations are those that torch itself counts in a forward and backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from structcot.data.batch import MicroBatch, pack
from structcot.data.plan import document_costs
from structcot.flops import peak_flops_per_second, step_flops
from structcot.model.decoder import Decoder
from structcot.model.spec import ModelSpec
from structcot.model.weights import build_model
from structcot.train import count_flops
from tests.one_step import loss_and_gradients, make_run
from tests.tiny_models import random_samples, tiny_checkpoint, tiny_config

LENGTHS = (40, 17, 96)
# Both count the same products, once those that are never made are put back by hand: whole numbers, held as floats.
EXACT = 1e-9


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=3)


@pytest.mark.parametrize("recompute", ["none", "block", "full"])
@pytest.mark.parametrize("tuning", [{}, {"lora_target_modules": ["q_proj", "down_proj"]}, {"method": "full"}], ids=["lora", "some", "full"])
def test_hardware_flops_are_the_products_that_torch_counts(
    tuning: dict[str, Any], recompute: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("structcot_kernels.launch.MIN_PROGRAMS", 1)  # one chunk of tokens: no additions of partial sums beside the products
    config = tiny_config(model_dir, tuning={"lora_r": 8, **tuning})
    model = build_model(model_dir, config, torch.device("cpu"))
    model.recompute = recompute
    batch = pack(random_samples(LENGTHS))
    counted = step_flops(model.spec, LENGTHS, batch.num_supervised, config.tuning, recompute).hardware
    attention = attention_forward(model.spec) * (4.5 if recompute == "full" else 3.5)
    assert counted - attention == pytest.approx(products(model, batch) + never_made(model, batch), rel=EXACT)


def test_model_flops_are_what_the_mathematics_asks_for(model_dir: Path) -> None:
    config, full_config = (tiny_config(model_dir, tuning=tuning) for tuning in ({"lora_r": 8}, {"method": "full"}))
    model = build_model(model_dir, config, torch.device("cpu"))
    spec, adapters, num_tokens = model.spec, sum(parameter.numel() for parameter in model.trained_parameters().values()), sum(LENGTHS)
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("_proj.weight"))
    weights += model.lm_head.weight.numel()
    kept, recomputed = (step_flops(spec, LENGTHS, 10, config.tuning, recompute).model for recompute in ("none", "full"))
    assert kept == recomputed == pytest.approx((4 * weights + 6 * adapters) * num_tokens + 3 * attention_forward(spec), rel=EXACT)
    full = step_flops(spec, LENGTHS, 10, full_config.tuning, "none").model
    assert full == pytest.approx(6 * weights * num_tokens + 3 * attention_forward(spec), rel=EXACT)


def test_a_step_counts_the_documents_labels_and_adapters_of_all_its_microbatches(model_dir: Path) -> None:
    config = tiny_config(model_dir, train={"batch_sequences": len(LENGTHS)}, parallel={"max_tokens_per_microbatch": max(LENGTHS)})
    model = build_model(model_dir, config, torch.device("cpu"))
    run, _ = make_run(model, random_samples(LENGTHS), config)
    batches = run.feed.step_batches(0)
    assert len(batches) > 1
    lengths = [length for batch in batches for length in batch.lengths_S]
    num_labels = sum(batch.num_supervised for batch in batches)
    assert sorted(lengths) == sorted(LENGTHS)
    assert count_flops(run, 0) == step_flops(model.spec, sorted(LENGTHS), num_labels, config.tuning, "none")


def test_the_plans_cost_of_a_document_is_in_proportion_to_its_forward_flops(model_dir: Path) -> None:
    config = tiny_config(model_dir, tuning={"method": "full"})
    spec = build_model(model_dir, config, torch.device("cpu")).spec
    flops = [step_flops(spec, [length], 0, config.tuning, "none").model for length in (100, 5000)]
    costs = document_costs([100, 5000], spec.attention_ratio)
    assert flops[1] / flops[0] == pytest.approx(costs[1] / costs[0], rel=EXACT)


def test_the_rate_of_a_cpu_is_measured() -> None:
    assert 1e8 < peak_flops_per_second(torch.device("cpu"), torch.float32) < 1e14


def products(model: Decoder, batch: MicroBatch) -> int:
    """Floating-point operations of the matrix products in a forward and backward pass, attention's own left out."""
    with FlopCounterMode(display=False) as counter:
        loss_and_gradients(model, [batch])
    by_operation: Mapping[Any, int] = counter.get_flop_counts()["Global"]
    operators = ("aten.mm", "aten.addmm", "aten.addmm_", "structcot.low_rank_up", "structcot.low_rank_grad")
    head = 2 * (3 if model.lm_head.weight.requires_grad else 2) * batch.num_supervised * model.lm_head.weight.numel()
    return head + sum(flops for operation, flops in by_operation.items() if str(operation) in operators)


def never_made(model: Decoder, batch: MicroBatch) -> int:
    """What the formula counts and nobody computes.

    Where the embedding is frozen, that is the gradient of what q, k and v of the first block read.
    """
    if model.model.embed_tokens.weight.requires_grad:
        return 0
    block, names = model.model.layers[0], ("q_proj", "k_proj", "v_proj")
    weights = sum(block.get_parameter(f"self_attn.{name}.weight").numel() for name in names)
    weights += sum(pair.lora_A.numel() for name, pair in block.get_submodule("adapters").named_children() if name in names)
    return 2 * weights * batch.num_tokens


def attention_forward(spec: ModelSpec) -> float:
    """Scores and weighted values, each 2 head_dim operations for every pair of a token and one before it: half of all pairs."""
    return sum(spec.num_layers * spec.num_heads * 2 * 2 * spec.head_dim * length**2 / 2 for length in LENGTHS)
