"""A small model of the Qwen2 architecture that has learned nothing yet, and a tokenizer with a word for everything that clock puzzles say.

A number is one token, whatever its digits are, so a wrong digit is another number and never a spelling mistake. The tokenizer is exact:
what it decodes is what it was given, since text without a word of its own is spelled in bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from structcot.tags import SOLUTION_TAGS, THOUGHT_TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HIDDEN, LAYERS, HEAD, CONTEXT = 256, 4, 64, 1024
FEED_FORWARD_RATIO = 8 / 3
ROWS_MULTIPLE = 64
# Twice the usual 0.02, which is meant for models four times as wide.
INITIAL_SPREAD = 0.04
PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WORDS = (
    *("make", "from", "need", "Need", "left", "Wait", "going", "back", "Check", "yes", "no", "not"),
    *("user", "assistant", "system"),
)
SIGNS = (":", ",", ".", "}", "\\boxed{", "+", "-", "*", "=")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: bytes, and words, signs and numbers up to 99 with or without a space before them.

    It is of the class that transformers loads for every model of this architecture, whatever is saved: that one splits numbers into digits
    unless they are added tokens.
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    make: Any = Qwen2Tokenizer  # what it takes is not what its annotations say
    numbers = [*map(str, range(100)), *(f"0{digit}" for digit in range(10))]
    spaced = [space + text for text in (*numbers, *WORDS, *SIGNS) for space in ("", " ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = make(
        vocab={byte: index for index, byte in enumerate(alphabet)},
        merges=[],
        unk_token=None,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[BEGIN],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    added = [*THOUGHT_TAGS[0], *SOLUTION_TAGS, "\n\n", *spaced]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_model(directory: Path, seed: int) -> None:
    """Write the model, its weights drawn at random, with its tokenizer, as a Hugging Face checkpoint in bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer: Any = make_tokenizer()
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // ROWS_MULTIPLE) * ROWS_MULTIPLE,
        hidden_size=HIDDEN,
        intermediate_size=round(HIDDEN * FEED_FORWARD_RATIO / ROWS_MULTIPLE) * ROWS_MULTIPLE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD,
        max_position_embeddings=CONTEXT,
        initializer_range=INITIAL_SPREAD,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))
