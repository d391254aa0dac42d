"""What every engine is given and gives back: requests in, outputs as they are finished, each with the key of its request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# "stop": the model ended its turn or wrote a stop string; "length": it was cut at max_new_tokens or at the end of its context;
# "refused": nothing was generated, since the prompt leaves no room in the context or the server refuses it, for the `reason` given;
# "failed": the server failed this request each time, and whoever asks has allowed for that.
FINISH_REASONS = ("stop", "length", "refused", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest one; `top_k` 0 considers all; `stop` are strings that end an output.

    `max_new_tokens` is cut to what the prompt leaves of the model's context.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 32768
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One output wanted: `messages` are (role, content) turns for the chat template, or else `prompt` is plain text as it is.

    `prefill` is what the model is to have written already, and goes on from; an engine behind a server takes none.
    `key` names the request, and with `seed` makes its random numbers: a request gives the same output in any batch, up to ties.
    """

    key: str
    messages: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    prefill: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What the model wrote: text without the stop string and without the end-of-turn token, and counts of tokens.

    `completion_tokens` counts the end-of-turn token; `seconds` is from the start of its generation to its end.
    """

    key: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    reason: str = ""


# Yields outputs in the order in which they are finished; each request once.
Engine = Callable[[Sequence[Request], Sampling], Iterator[Output]]
