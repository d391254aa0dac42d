"""Answers to held-out prompts: what counts as structured, where prompts end, and the demo as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from structcot.config_file import load_config
from structcot.errors import FetchError
from structcot.fetch import fetch
from structcot.generate import generate, is_structured
from structcot.metrics import read_metrics
from structcot.train import train

ROOT = Path(__file__).parent.parent
SKY_T1 = "<|begin_of_thought|>\n\nWait.<|end_of_thought|>\n\n<|begin_of_solution|>\n\n4<|end_of_solution|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SKY_T1, True),
        ("<think>\nWait.\n</think>\n\n4", True),
        (SKY_T1.replace("<|end_of_thought|>", ""), False),
        (SKY_T1.replace("<|end_of_solution|>", ""), False),
        ("<|begin_of_solution|>4<|end_of_solution|><|begin_of_thought|>Wait.<|end_of_thought|>", False),
        ("<think>\nWait.\n</think>\n\n", False),
        ("4", False),
        ("", False),
    ],
    ids=["sky-t1", "think", "thought-open", "solution-open", "solution-first", "nothing-after", "bare", "empty"],
)
def test_structured_is_a_closed_thought_and_then_a_solution(text: str, expected: bool) -> None:
    assert is_structured(text) is expected


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_demo_learns_the_structure_of_its_demonstrations(tmp_path: Path) -> None:
    try:
        fetch("smollm2-135m")
    except FetchError as error:
        pytest.skip(f"the demo's model cannot be fetched: {error}")
    data = fetch("countdown", tmp_path / "countdown", num_records=1200)
    config = load_config(ROOT / "configs" / "smollm2_demo.toml", [f'data.train="{data}"', f'output_dir="{tmp_path / "run"}"'])
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # the suite runs on one thread, which takes twice as long here
    try:
        train(config)
        (answer,) = generate(tmp_path / "run", num_prompts=1, max_new_tokens=500)
    finally:
        torch.set_num_threads(threads)
    losses = [metrics["train/loss"] for metrics in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] <= 0.85 * losses[0], "the loss falls by at least 15 %"
    assert json.loads((tmp_path / "run" / "adapter" / "certificate.json").read_text())["passed"]
    assert answer.structured, answer.completion
    assert answer.finished, answer.completion
