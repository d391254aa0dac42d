"""What a server's answer says, read from its body: a completion, or why it is none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

LONGEST_REFUSAL_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a model wrote. `finish_reason` is "length" where it ran into `max_tokens`, "" where the server does not say.

    The counts are of tokens, None where the server does not count. `thought` is what some servers cut off from the text in front of it.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    thought: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no completion, the HTTP status or 0, whether asking again can help, and how many seconds the server asks to wait.

    `kind` says the same as `reason` in words that many failures share, to be counted.
    """

    reason: str
    kind: str = "no answer"
    status: int = 0
    is_final: bool = False
    retry_after: float = 0.0


def read_completion(body: bytes) -> Completion | Failure:
    """Find the text in an answer. Some servers send errors with status 200, beside or in place of the choices."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return Failure(reason=f"the answer is not JSON: {body[:LONGEST_REFUSAL_BYTES].decode('utf-8', errors='replace')}", kind="not JSON")
    if not isinstance(answer, dict):
        return Failure(reason="the answer is no JSON object", kind="not JSON")
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message, finish_reason, usage = choice.get("message"), choice.get("finish_reason"), answer.get("usage")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    thought = _thought(message) if isinstance(message, dict) else ""
    text = "" if text is None and thought else text  # cut in the thought
    if answer.get("error") or choice.get("error") or finish_reason in ("error", "abort"):
        words = answer.get("error") or choice.get("error") or text
        return Failure(reason=f"the answer is an error: {own_words(json.dumps(words).encode())}", kind="error in the answer")
    if not choice:
        return Failure(reason="the answer has no choices", kind="no choices")
    if not isinstance(text, str):
        reason = f"the answer has no text: the content is {json.dumps(text)}, finish_reason {json.dumps(finish_reason)}"
        return Failure(reason=reason, kind="no text")
    counts = usage if isinstance(usage, dict) else {}
    return Completion(
        text=text,
        finish_reason=finish_reason if isinstance(finish_reason, str) else "",
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
        thought=thought,
    )


def own_words(body: bytes) -> str:
    """What a server says of an error: the message in its JSON, or all of it."""
    text = body.decode("utf-8", errors="replace")
    try:
        answer: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            answer = answer[name]
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _thought(message: dict[str, Any]) -> str:
    """What vLLM, DeepSeek and others put beside the content when they take the thought out of it."""
    values = [message.get(name) for name in ("reasoning_content", "reasoning")]
    return next((value for value in values if isinstance(value, str) and value), "")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
