"""Many ranks train as one does: the same loss, gradients and weights, however a step is laid over ranks, micro-batches and slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from structcot.config import Config
from structcot.data.plan import spread
from structcot.data.render import IGNORE, RenderedSample
from tests.one_step import RESHAPED, ROUNDED, assert_near, relative_error
from tests.ranks import Steps, on_ranks, run_steps, run_steps_of
from tests.tiny_models import random_samples, tiny_checkpoint, tiny_config

LENGTHS = [30, 12, 61, 25, 7, 44, 18, 33, 5, 52, 21, 40]
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, of which so many share a micro-batch
METHODS: dict[str, dict[str, Any]] = {"lora": {"lora_r": 6}, "full": {"method": "full"}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "qwen2")


def config_of(model_dir: Path, num_microbatches: int, ranks: int, sequence: int, tuning: dict[str, Any], **parallel: Any) -> Config:
    """All samples in every step, in exactly so many micro-batches."""
    rate = 3e-4 if tuning.get("method") == "full" else 1e-2  # all weights want less than adapters do
    train = {"batch_sequences": len(LENGTHS), "max_steps": 20, "max_grad_norm": 1e9, "learning_rate": rate}
    for max_tokens in range(max(LENGTHS), sum(LENGTHS) + 1):
        bins = spread(range(len(LENGTHS)), LENGTHS, num_ranks=ranks // sequence, max_tokens=max_tokens, attention_ratio=0.0)
        if len(bins[0]) <= num_microbatches:
            layout = {"max_tokens_per_microbatch": -(-max_tokens // sequence), "sequence": sequence, **parallel}
            return tiny_config(model_dir, tuning=tuning, train=train, parallel=layout)
    raise AssertionError(f"no cap gives {num_microbatches} micro-batches")


def reference(model_dir: Path, samples: list[RenderedSample], tuning: dict[str, Any], num_steps: int) -> Steps:
    return run_steps(model_dir, samples, config_of(model_dir, 1, 1, 1, tuning), num_steps)


def assert_same(got: Steps, wanted: Steps, tolerance: float = RESHAPED) -> None:
    assert relative_error(got.losses[0], wanted.losses[0]) <= tolerance
    assert relative_error(got.grad_norms[0], wanted.grad_norms[0]) <= tolerance
    assert_near(got.gradients, wanted.gradients, tolerance)


@pytest.mark.parametrize(("ranks", "sequence"), LAYOUTS, ids=lambda value: str(value))
def test_loss_and_every_gradient_are_those_of_one_process(ranks: int, sequence: int, model_dir: Path) -> None:
    samples = random_samples(LENGTHS)
    cases = [(method, number) for method in METHODS for number in (1, 2, 3)]
    configs = [config_of(model_dir, number, ranks, sequence, METHODS[method]) for method, number in cases]
    results = on_ranks(ranks, run_steps_of, model_dir, samples, configs, 1)
    for (method, number), *steps in zip(cases, *results, strict=True):
        wanted = reference(model_dir, samples, METHODS[method], 1)
        for one in steps:
            assert one.num_microbatches >= number or ranks == 4
            assert_same(one, wanted)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ranks", "sequence"), [pytest.param(4, 1, marks=pytest.mark.slow), (4, 2)], ids=str)
@pytest.mark.parametrize("kind", ["qwen2", pytest.param("llama3-rope-tied", marks=pytest.mark.slow)])
def test_twenty_steps_end_where_one_process_ends(kind: str, ranks: int, sequence: int, method: str, tmp_path: Path) -> None:
    model_dir, samples = tiny_checkpoint(tmp_path, kind), random_samples(LENGTHS)
    wanted = reference(model_dir, samples, METHODS[method], 20)
    (got,), *others = on_ranks(ranks, run_steps_of, model_dir, samples, [config_of(model_dir, 2, ranks, sequence, METHODS[method])], 20)
    assert max(relative_error(*pair) for pair in zip(got.losses, wanted.losses, strict=True)) <= ROUNDED
    # Softmax hardly sees a bias of the keys, so its gradient is what is left of terms that cancel, and Adam brings the rest to full size.
    clear = [name for name in wanted.parameters if not name.endswith("k_proj.bias")]
    assert_near({name: got.parameters[name] for name in clear}, {name: wanted.parameters[name] for name in clear}, ROUNDED)
    assert all(other.losses == got.losses for (other,) in others), "ranks report different losses"
    assert wanted.losses[-1] < 0.9 * wanted.losses[0]


@pytest.mark.parametrize("recompute", ["block", *(pytest.param(one, marks=pytest.mark.slow) for one in ("none", "full"))])
def test_documents_without_a_label_ranks_without_a_document_and_dropout_change_nothing(recompute: str, model_dir: Path) -> None:
    lengths = [40, 9, 23]  # fewer than ranks, and of unequal label counts
    samples = random_samples(lengths)
    samples[1] = replace(samples[1], labels_T=np.full_like(samples[1].labels_T, IGNORE))
    tuning = {"lora_r": 6, "lora_dropout": 0.3}
    train = {"batch_sequences": 3, "max_steps": 2, "max_grad_norm": 1e9}

    def config(sequence: int) -> Config:
        parallel = {"max_tokens_per_microbatch": 80, "sequence": sequence, "recompute": recompute}
        return tiny_config(model_dir, tuning=tuning, train=train, parallel=parallel)

    wanted = run_steps(model_dir, samples, config(1), 2)
    for sequence in (1, 2):
        for (got,) in on_ranks(4, run_steps_of, model_dir, samples, [config(sequence)], 2):
            assert_same(got, wanted)
            assert_near(got.parameters, wanted.parameters, ROUNDED)


def test_weights_are_sharded_whole_or_in_replicas(model_dir: Path) -> None:
    samples = random_samples(LENGTHS)
    wanted = reference(model_dir, samples, METHODS["lora"], 1)
    for replicate, share in ((1, 0.25), (2, 0.5), (4, 1.0)):
        config = config_of(model_dir, 1, 4, 1, METHODS["lora"], replicate=replicate)
        for (got,) in on_ranks(4, run_steps_of, model_dir, samples, [config], 1):
            assert np.mean(got.held_shares) == pytest.approx(share, abs=0.1)
            assert_same(got, wanted)
