"""One training step, ours beside transformers + PEFT: tokens per second of forward and backward on the same documents.

Run as `python -m bench.bench_step --model DIR [--documents 5] [--tokens 400] [--json FILE]`. Both sides hold the same weights in bf16
and adapters of the same rank, and see the same token ids, all of them trained on, which is the other side's best case: it puts every row
through the head. It also gets documents of equal length as a batch without padding. Its adapters are fp32, as PEFT makes them.
Each side runs in turn, `--repeats` times, after one warm-up; the best time counts, since anything else on the machine only adds to it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.report import device_name
from structcot.config import Config
from structcot.config_file import parse_config
from structcot.data.batch import MicroBatch, pack
from structcot.data.render import unmasked_sample
from structcot.fetch import resolve_model
from structcot.model.weights import build_model


def main() -> None:
    """Measure and print one line for each side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each document")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = run_config(options.model, options.rank)
    model_dir = resolve_model(config.model_name_or_path, config.revision)
    batch = random_documents(options.documents, options.tokens)
    sides = {"structcot": our_step(model_dir, config, batch), "transformers+peft": peft_step(model_dir, config, batch, options.documents)}
    best_seconds = race(sides, options.repeats)
    facts = {
        "machine": device_name(torch.device("cpu")),
        "documents": options.documents,
        "tokens_per_document": options.tokens,
        "tokens_per_second": {name: batch.num_tokens / seconds for name, seconds in best_seconds.items()},
    }
    for name, rate in facts["tokens_per_second"].items():
        print(f"{name:20} {rate:8.1f} tokens/s")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def run_config(model: str, rank: int) -> Config:
    """A LoRA run of all projections in bf16."""
    values = {"model_name_or_path": model, "output_dir": "unused", "data": {"train": ["unused"]}, "tuning": {"lora_r": rank}}
    return parse_config(values, origin="bench_step")


def random_documents(count: int, tokens: int) -> MicroBatch:
    """Documents of random ids below 30,000."""
    generator = np.random.default_rng(0)
    return pack([unmasked_sample(generator.integers(0, 30_000, tokens), source=f"random:{number}") for number in range(count)])


def our_step(model_dir: Path, config: Config, batch: MicroBatch) -> Callable[[], None]:
    """Forward and backward through structcot's decoder."""
    model = build_model(model_dir, config, torch.device("cpu"))

    def step() -> None:
        loss_sum, _ = model(batch)
        (loss_sum / batch.num_supervised).backward()
        model.zero_grad()

    return step


def peft_step(model_dir: Path, config: Config, batch: MicroBatch, documents: int) -> Callable[[], None]:
    """Forward and backward through transformers and PEFT, documents as rows of a batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.bfloat16)
    lora = LoraConfig(r=config.tuning.lora_r, lora_alpha=int(config.tuning.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    ids_BT = batch.tokens_T.view(documents, -1)

    def step() -> None:
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        model.zero_grad()

    return step


def race(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Best seconds of each side, the sides taking turns."""
    best_seconds = dict.fromkeys(sides, float("inf"))
    for step in sides.values():
        step()
    for _ in range(repeats):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            best_seconds[name] = min(best_seconds[name], time.perf_counter() - start)
    return best_seconds


if __name__ == "__main__":
    main()
