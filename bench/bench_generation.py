"""Writing outputs, the embedded engine beside transformers' `generate`: tokens per second of one model on the same prompts.

Run as `python -m bench.bench_generation --model DIR [--new-tokens 256] [--batch 8] [--json FILE]`. Three sides take turns, `--repeats`
times after a warm-up: `generate` with one prompt at a time, the engine with one at a time, and the engine with `--batch` at a time.
Nothing ends an output before its last token on any side, so all of them write the same number of tokens a prompt; the sides with one at a
time answer the first `--singles` prompts of the batch. Prompts differ in length, and reading them is part of the time. The rate of a side
is that of its best run, since anything else on the machine only takes from it; the median is written beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.report import device_name
from structcot.device import choose_device
from structcot.eval.batching import Batcher, Row
from structcot.eval.decoding import Endings, random_numbers
from structcot.eval.embedded import load_model, load_tokenizer
from structcot.eval.engine import Sampling
from structcot.fetch import resolve_model

QUESTIONS = (
    "What is 17 * 23?",
    "Explain why the sky is blue, and why sunsets are red.",
    "A train leaves at 9:40 and arrives at 13:05, with a stop of 12 minutes on the way. For how long does it move?",
    "Write a story about a dragon that learns to bake bread.",
    "Is 391 a prime number? Think step by step, and check your answer.",
    "How many ways are there to choose 3 books out of 8?",
    "List the planets.",
    "Let x + y = 10 and x * y = 21. Find x * x + y * y, show each step, verify it with numbers, and then say in a word what you have done.",
)
SINGLE, ONE_ROW, BATCH = "generate, batch 1", "engine, batch 1", "engine, batch {}"


def main() -> None:
    """Measure and print one line for each side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--singles", type=int, default=2, help="prompts of the sides with one at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model_dir = resolve_model(options.model, "main")
    device = choose_device()
    model, tokenizer = load_model(model_dir, getattr(torch, options.dtype), device), load_tokenizer(model_dir)
    model.generation_config.eos_token_id = None  # so that `generate` goes on to the last token too, and looks for no end
    prompts = [encode(tokenizer, QUESTIONS[number % len(QUESTIONS)]) for number in range(options.batch)]
    singles = prompts[: options.singles]
    sides = {
        SINGLE: generate_side(model, singles, options.new_tokens),
        ONE_ROW: engine_side(model, tokenizer, singles, options.new_tokens, 1),
        BATCH.format(options.batch): engine_side(model, tokenizer, prompts, options.new_tokens, options.batch),
    }
    rates = race(sides, options.repeats)
    facts = {
        "machine": device_name(device),
        "model": options.model,
        "dtype": options.dtype,
        "new_tokens": options.new_tokens,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "tokens_per_second": {name: {"best": max(side), "median": statistics.median(side)} for name, side in rates.items()},
        "times_generate": {name: max(side) / max(rates[SINGLE]) for name, side in rates.items()},
    }
    for name, side in rates.items():
        print(f"{name:20} {max(side):8.1f} tokens/s best {statistics.median(side):8.1f} median {max(side) / max(rates[SINGLE]):6.2f} x")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Any, question: str) -> list[int]:
    """A question in the chat template, as tokens."""
    turns = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])


def generate_side(model: Any, prompts: list[list[int]], new_tokens: int) -> Callable[[], int]:
    """`generate` on one prompt after the other, greedy."""

    def run() -> int:
        """Returns the number of new tokens."""
        count = 0
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            limits = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits)
            count += out.shape[1] - len(prompt)
        return count

    return run


def engine_side(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int, batch_size: int) -> Callable[[], int]:
    """The engine's loop, greedy, `batch_size` prompts at a time."""
    batcher = Batcher(model, batch_size)
    endings = Endings(tokenizer=tokenizer, token_ids=frozenset())

    def run() -> int:
        """Returns the number of new tokens."""
        rows = [
            Row(index=index, prompt=prompt, limit=new_tokens, numbers=random_numbers(0, str(index)), tokens=[])
            for index, prompt in enumerate(prompts)
        ]
        return sum(len(row.tokens) for row in batcher.run(rows, Sampling(), endings))

    return run


def race(sides: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each side in every round, the sides taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            count = run()
            if round_number > 0:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


if __name__ == "__main__":
    main()
