"""What a tokenizer makes of a request, the same in every engine that runs a model itself: its tokens, and the token that ends a turn."""

from __future__ import annotations

from typing import Any

from structcot.data.records import Message
from structcot.data.turns import UnfitRecord, chat_template, lay_out
from structcot.errors import ConfigError
from structcot.eval.engine import Request


def prompt_tokens(tokenizer: Any, name: str, request: Request) -> list[int]:
    """The prompt as the chat template writes it, or plain text with the tokens that the tokenizer begins every text with; then the prefill.

    `name` is the model's, for messages to the user.

    Raises:
        ConfigError: if there are messages and no chat template.
        TemplateError, ValueError ...: one of `structcot.data.turns.TEMPLATE_ERRORS`, if the template refuses the messages.
    """
    begun = list(tokenizer(request.prefill, add_special_tokens=False)["input_ids"]) if request.prefill else []
    if not request.messages:
        return [*tokenizer(request.prompt)["input_ids"], *begun]
    if not tokenizer.chat_template:
        raise ConfigError(f"{name}: has no chat template for messages; use an instruction-tuned model, or give plain prompts")
    turns = [{"role": role, "content": content} for role, content in request.messages]
    return [*tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"], *begun]


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an assistant's turn, if it does: a base model's own end is another one."""
    if not tokenizer.chat_template:
        return None
    trial = [Message(role="user", content="Question"), Message(role="assistant", content="Answer")]
    try:
        return lay_out(trial, chat_template(tokenizer)).turns[-1].end_id
    except UnfitRecord:
        return None
