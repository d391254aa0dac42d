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


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_hardware_flops_are_the_products_that_torch_counts(method: str, recompute: bool, model_dir: Path) -> None:
    model = build_model(model_dir, tiny_config(model_dir, tuning={"method": method, "lora_r": 8}), torch.device("cpu"))
    model.recompute = recompute
    batch = pack(random_samples(LENGTHS))
    adapters = None if method == "full" else sum(parameter.numel() for parameter in model.trained_parameters())
    counted = step_flops(model.spec, LENGTHS, batch.num_supervised, adapters, recompute).hardware
    attention = attention_forward(model.spec) * (4.5 if recompute else 3.5)
    assert counted - attention == pytest.approx(products(model, batch) + never_made(model, batch), rel=EXACT)


def test_model_flops_are_what_the_mathematics_asks_for(model_dir: Path) -> None:
    model = build_model(model_dir, tiny_config(model_dir, tuning={"lora_r": 8}), torch.device("cpu"))
    spec, adapters, num_tokens = model.spec, sum(parameter.numel() for parameter in model.trained_parameters()), sum(LENGTHS)
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("_proj.weight"))
    weights += model.lm_head.weight.numel()
    kept, recomputed = (step_flops(spec, LENGTHS, 10, adapters, recompute).model for recompute in (False, True))
    assert kept == recomputed == pytest.approx((4 * weights + 6 * adapters) * num_tokens + 3 * attention_forward(spec), rel=EXACT)
    full = step_flops(spec, LENGTHS, 10, None, False).model
    assert full == pytest.approx(6 * weights * num_tokens + 3 * attention_forward(spec), rel=EXACT)


def test_a_step_counts_the_documents_labels_and_adapters_of_all_its_microbatches(model_dir: Path) -> None:
    config = tiny_config(model_dir)
    model = build_model(model_dir, config, torch.device("cpu"))
    run, _ = make_run(model, random_samples(LENGTHS), config)
    batches = [pack(random_samples(LENGTHS)[:2]), pack(random_samples(LENGTHS)[2:])]
    adapters = sum(parameter.numel() for parameter in model.trained_parameters())
    num_labels = sum(batch.num_supervised for batch in batches)
    assert count_flops(run, batches) == step_flops(model.spec, LENGTHS, num_labels, adapters, False)


def test_the_plans_cost_of_a_document_is_in_proportion_to_its_forward_flops(model_dir: Path) -> None:
    spec = build_model(model_dir, tiny_config(model_dir, tuning={"method": "full"}), torch.device("cpu")).spec
    flops = [step_flops(spec, [length], 0, None, False).model for length in (100, 5000)]
    costs = document_costs([100, 5000], spec.attention_ratio)
    assert flops[1] / flops[0] == pytest.approx(costs[1] / costs[0], rel=EXACT)


def test_the_rate_of_a_cpu_is_measured() -> None:
    assert 1e8 < peak_flops_per_second(torch.device("cpu"), torch.float32) < 1e14


def products(model: Decoder, batch: MicroBatch) -> int:
    """Floating-point operations of the matrix products in a forward and backward pass, attention's own left out."""
    with FlopCounterMode(display=False) as counter:
        loss_and_gradients(model, [batch])
    by_operation: Mapping[Any, int] = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in by_operation.items() if str(operation) in ("aten.mm", "aten.addmm"))


def never_made(model: Decoder, batch: MicroBatch) -> int:
    """What the formula counts and nobody computes.

    Where the embedding is frozen, that is the gradient of what q, k and v of the first block read; where blocks are recomputed, the last
    product of each block, since nothing in the backward needs its result.
    """
    blocks, weights = list(model.model.layers), 0
    if not model.model.embed_tokens.weight.requires_grad:
        attention, adapters = blocks[0].get_submodule("self_attn"), blocks[0].get_submodule("adapters")
        for name in ("q_proj", "k_proj", "v_proj"):
            weights += attention.get_parameter(f"{name}.weight").numel() + adapters.get_parameter(f"{name}.lora_A").numel()
    if model.recompute:
        is_full = blocks[0].get_submodule("mlp").get_parameter("down_proj.weight").requires_grad
        weights += sum(block.get_parameter("mlp.down_proj.weight" if is_full else "adapters.down_proj.lora_B").numel() for block in blocks)
    return 2 * weights * batch.num_tokens


def attention_forward(spec: ModelSpec) -> float:
    """Scores and weighted values, each 2 head_dim operations for every pair of a token and one before it: half of all pairs."""
    return sum(spec.num_layers * spec.num_heads * 2 * 2 * spec.head_dim * length**2 / 2 for length in LENGTHS)
