"""Tiny tokenizers and chat templates of the kinds that models have, made on the spot."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from structcot.config import DataConfig
from structcot.data.records import Message, Record

SHARED = Path(__file__).parents[2] / "shared" / "data"
SPECIAL = ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "</s>")
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Qwen2.5 and Llama 3 split text
LINES = [
    "assistant\n\n\nuser\nsystem\nThe answer is 42.\n\nWait, let me check that again.",
    "<|begin_of_thought|>\n\nSo 2 + 2 = 4.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>",
    "<think>\nHmm.\n</think>\n\nIt is so.  Two spaces, é, ü, 中文.",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a small model.<|im_end|>\n' }}{% endif %}" + CHATML
)
CHATML_GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_GENERATION_PROMPT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
NO_END_OF_TURN = "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] + '\n' }}{% endfor %}"
OPENS_THOUGHT = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
DROPS_THOUGHT = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
CHANGES_TEXT = CHATML.replace("message['content']", "message['content']|replace('4', 'four')")
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% set content = message.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(template: str = CHATML, pad: str = "<|begin_of_text|>", special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of 400 tokens that merges newlines with newlines and spaces."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES * 3, trainer)
    end = "<|im_end|>" if "<|im_end|>" in special else None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad, chat_template=template)


@functools.cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Official tokenizer of Qwen2.5; skips the test where it is not at hand."""
    directory = SHARED / "qwen2_5_tokenizer"
    if not directory.exists():
        pytest.skip("the Qwen2.5 tokenizer is not at hand (../shared/data/qwen2_5_tokenizer)")
    return AutoTokenizer.from_pretrained(str(directory))


def data_config(**values: object) -> DataConfig:
    """Build `[data]` with a placeholder path."""
    return DataConfig.model_validate({"train": ["data.jsonl"], **values})


def conversation(*contents: str, system: str | None = None, source: str = "data.jsonl:1", prompt_messages: int = 0) -> Record:
    """Build a record from user and assistant texts in turn."""
    turns = [Message(role=("user", "assistant")[index % 2], content=content) for index, content in enumerate(contents)]
    first = [] if system is None else [Message(role="system", content=system)]
    return Record(source=source, origin="data.jsonl", messages=(*first, *turns), prompt_messages=prompt_messages)
