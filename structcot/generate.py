"""Generate: what a trained run answers to prompts that it was not trained on, greedy, with transformers and PEFT.

A look, not a measurement. Run as `python -m structcot.generate RUN`, or `structcot generate RUN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from structcot.certificate import load_plain
from structcot.config import Config
from structcot.config_file import load_config
from structcot.console import say
from structcot.data.render import NONE, PROMPT
from structcot.errors import ExportError
from structcot.prepare import Prepared, prepare
from structcot.tags import SOLUTION_TAGS, THOUGHT_TAGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer with its control tokens: `finished` if the model ended it, `structured` if a thought closes before a solution."""

    source: str
    prompt: str
    completion: str
    finished: bool
    structured: bool


def generate(run_dir: Path, *, num_prompts: int, max_new_tokens: int) -> list[Completion]:
    """Answer the first held-out prompts of a run (its first training prompts where nothing is held out), streaming text to the terminal.

    Raises:
        ExportError: if the run has exported nothing yet.
    """
    if not any((run_dir / name / "certificate.json").exists() for name in ("adapter", "model")):
        raise ExportError(f"{run_dir}: has no adapter/ or model/; train it to the end, or run structcot export {run_dir}")
    config = load_config(run_dir / "config.toml").model_copy(update={"output_dir": str(run_dir)})
    prepared = prepare(config, lambda: False)
    model = load_exported(run_dir, prepared.model_dir, config)
    return [_complete(model, prepared, prompt, source, max_new_tokens) for source, prompt in held_out_prompts(prepared, num_prompts)]


def load_exported(run_dir: Path, model_dir: Path, config: Config):
    """The exported model of a run in transformers: base and adapter merged, or all weights."""
    from peft import PeftModel

    adapter = run_dir / "adapter"
    if not adapter.exists():
        return load_plain(run_dir / "model", config)
    return PeftModel.from_pretrained(load_plain(model_dir, config), str(adapter)).merge_and_unload().eval()


def held_out_prompts(prepared: Prepared, num_prompts: int) -> list[tuple[str, list[int]]]:
    """(place in the data, tokens up to the assistant's first) of the first samples that were held out."""
    data = prepared.data
    store, indices = (data.eval, data.eval_indices) if data.eval is not None else (data.train, data.train_indices)
    prompts = []
    for index in indices[:num_prompts]:
        sample = store.sample(int(index))
        first_trained = int(np.flatnonzero((sample.kinds_T != NONE) & (sample.kinds_T != PROMPT))[0])
        prompts.append((sample.source, sample.tokens_T[: first_trained + 1].tolist()))
    return prompts


def is_structured(text: str) -> bool:
    """Whether `text` closes a thought and then gives a solution, between the solution tags where the thought has tags of that family."""
    for opening, closing in THOUGHT_TAGS:
        if opening in text and closing in text:
            rest = text.split(closing, 1)[1]
            return SOLUTION_TAGS[0] in rest and SOLUTION_TAGS[1] in rest if opening == THOUGHT_TAGS[0][0] else bool(rest.strip())
    return False


def _complete(model, prepared: Prepared, prompt: list[int], source: str, max_new_tokens: int) -> Completion:
    from transformers import TextStreamer

    tokenizer = prepared.tokenizer
    say(f"\n=== {source}\n{tokenizer.decode(prompt)!s}")
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
        )
    new_tokens = output[0, len(prompt) :].tolist()
    text = str(tokenizer.decode(new_tokens))
    return Completion(
        source=source,
        prompt=str(tokenizer.decode(prompt)),
        completion=text,
        finished=len(new_tokens) < max_new_tokens or new_tokens[-1] == tokenizer.eos_token_id,
        structured=is_structured(text),
    )


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("generate")
