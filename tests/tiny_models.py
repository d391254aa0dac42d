"""Tiny random checkpoints in Hugging Face format, samples of random tokens, and configs: what a test of the numerics starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from structcot.config import Config
from structcot.config_file import parse_config
from structcot.data.render import END, IGNORE, NONE, SOLUTION, THOUGHT, RenderedSample
from tests.chat_tokenizers import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 3e-3,  # large enough to be missed where it is left out
    "bos_token_id": None,
    "eos_token_id": None,
}
# Both stretch some frequencies of a head of width 12 to 16, keep some and blend some.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}

MODELS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
    "llama3-rope-tied": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-yarn-biases": (
        LlamaConfig,
        {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            "max_position_embeddings": 4096,
            "rope_parameters": YARN_ROPE,
        },
    ),
}
"""The kinds of model: q/k/v biases; q/k norms and heads wider than hidden / heads; llama3 rope, head tied; yarn rope, biases everywhere."""


def tiny_checkpoint(directory: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """Write a random fp32 model of the `kind` (a key of MODELS) with the config values `changes` into `directory`, and return it."""
    config_class, values = MODELS[kind]
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | values | changes), dtype=torch.float32)
    randomise(model, seed)
    model.save_pretrained(directory)
    return directory


def tiny_chat_model(directory: Path, seed: int = 0, template: str | None = None) -> Path:
    """Write a whole model directory that can be trained, exported and served: a random Qwen2 of 47 thousand weights in float32.

    Its byte-level tokenizer has fewer than 384 tokens, a ChatML template (or `template`) and <|im_end|> as its end of sequence.
    """
    tokenizer = tiny_tokenizer() if template is None else tiny_tokenizer(template)
    tiny_checkpoint(
        directory,
        "qwen2",
        seed,
        vocab_size=384,  # padded beyond the tokenizer's own, as in real models
        hidden_size=32,
        intermediate_size=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(str(directory))
    return directory


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight, norms and biases too, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1.0 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * (1.0 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5))


@torch.no_grad()
def randomise_adapters(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every lora_B, which starts at zero: an adapter that does nothing would hide what is wrong with it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def random_sample(length: int, vocab_size: int = SIZES["vocab_size"], seed: int = 0, origin: str = "random") -> RenderedSample:
    """Build a conversation of two turns: of `length` random tokens about two thirds are trained on, in two stretches.

    A sample of under 6 tokens is one turn after a prompt of one token.
    """
    tokens_T = np.random.default_rng([seed, length]).integers(0, vocab_size, length).astype(np.int32)
    token_kinds_T = np.full(length, NONE, dtype=np.uint8)
    turns = [(length // 6, length // 2), (length * 2 // 3, length)] if length >= 6 else [(1, length)]
    for start, end in turns:
        token_kinds_T[start:end] = THOUGHT
        token_kinds_T[(start + end) // 2 : end] = SOLUTION
        token_kinds_T[end - 1] = END
    kinds_T = np.append(token_kinds_T[1:], np.uint8(NONE))
    labels_T = np.where(kinds_T != NONE, np.append(tokens_T[1:], 0), IGNORE).astype(np.int32)
    return RenderedSample(
        source=f"{origin}.jsonl:{seed}",
        origin=origin,
        tokens_T=tokens_T,
        labels_T=labels_T,
        kinds_T=kinds_T,
        truncated=False,
        merged_start=False,
        prompt_differs=False,
    )


def random_samples(lengths: Sequence[int], vocab_size: int = SIZES["vocab_size"], seed: int = 0) -> list[RenderedSample]:
    """Build one random sample of each length."""
    return [random_sample(length, vocab_size, seed * 1000 + number) for number, length in enumerate(lengths)]


def tiny_config(model_dir: Path | str = "model", output_dir: Path | str = "run", **sections: Mapping[str, Any] | Any) -> Config:
    """Build a config for a small fp32 run; keyword arguments are sections (`tuning={"lora_r": 8}`) or values (`seed=1`).

    Each section is laid over what is given here: LoRA of rank 4, alpha 8.
    """
    values: dict[str, Any] = {
        "model_name_or_path": str(model_dir),
        "output_dir": str(output_dir),
        "data": {"train": ["train.jsonl"], "max_length": 2048},
        "tuning": {"lora_r": 4, "lora_alpha": 8.0},
        "train": {"dtype": "float32", "learning_rate": 1e-2},
        "parallel": {"max_tokens_per_microbatch": 4096, "recompute": "none"},
    }
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
    return parse_config(values, origin="test.toml")
