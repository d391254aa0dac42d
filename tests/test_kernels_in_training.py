"""The trainer on Triton's kernels (interpreted where there is no GPU) learns what it learns on PyTorch's operations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from structcot.model.weights import build_model
from structcot.train import train_step
from structcot_kernels import launch
from structcot_kernels.launch import use_backend
from tests.one_step import ROUNDED, assert_near, make_run, relative_error
from tests.tiny_models import random_samples, randomise_adapters, tiny_checkpoint, tiny_config
from tests.tiny_run import DONE, Site

NUM_STEPS = 20


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_twenty_steps_agree_with_those_on_pytorch(recompute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = tiny_checkpoint(tmp_path / "model", "qwen2")
    started: list[str] = []
    plain_launch = launch.launch

    def noted(kernel, *arguments, **meta) -> None:
        started.append(kernel.__name__)
        plain_launch(kernel, *arguments, **meta)

    for module in ("linear_cross_entropy", "low_rank", "rms_norm", "rope", "swiglu_low_rank"):
        monkeypatch.setattr(f"structcot_kernels.jit.{module}.launch", noted)
    losses, weights = zip(*(twenty_steps(model_dir, backend, recompute) for backend in ("torch", "triton")), strict=True)
    assert {"forward_kernel", "up_kernel", "grad_kernel"} <= set(started), "the kernels did not run"
    assert relative_error(losses[1], losses[0]) <= ROUNDED
    assert_near(weights[1], weights[0], ROUNDED)
    assert losses[0][-1] < losses[0][0]


def twenty_steps(model_dir: Path, backend: str, recompute: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every step, and the adapters after the last."""
    use_backend(backend)
    config = tiny_config(
        model_dir,
        train={"batch_sequences": 3, "max_steps": NUM_STEPS, "learning_rate": 1e-3},
        parallel={"max_tokens_per_microbatch": 48},
    )
    model = build_model(model_dir, config, torch.device("cpu"))
    model.recompute = recompute
    randomise_adapters(model)
    run, state = make_run(model, random_samples([24, 17, 33, 9, 40, 12]), config)
    losses = []
    for _ in range(NUM_STEPS):
        report = train_step(run, state)
        state = replace(state, step=report.step, num_tokens=report.num_tokens)
        losses.append(report.loss)
    return torch.tensor(losses), {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_run_says_what_computes_it(site: Site, tmp_path: Path) -> None:
    outcome = site.train(tmp_path / "run", "kernels=triton", "train.max_steps=1", 'train.dtype="float32"')
    assert outcome.status == DONE, outcome.err
    assert "kernels: triton, interpreted" in outcome.out + outcome.err
    assert "attention: sdpa" in outcome.out + outcome.err
