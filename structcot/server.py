"""A client of any server that answers `/chat/completions` and `/completions` as the OpenAI API does: vLLM, llama.cpp, or a hosted one.

A completion is returned only when the server gave one whole: what fails, is cut short or malformed is asked for again where that may help,
and raised as an error where it does not. The key is read from an environment variable for each request and is kept nowhere; where a server
repeats it in an error, it is blotted out. Redirects are not followed, since they would carry the key to another host.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from structcot import __version__
from structcot.completion import LONGEST_REFUSAL_BYTES, Completion, Failure, own_words, read_completion
from structcot.errors import ConfigError, ServerError

FIRST_WAIT_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0
LONGEST_RETRY_AFTER_SECONDS = 600.0
RETRIED_STATUSES = frozenset({408, 409, 429, *range(500, 600)})
_LONGEST_REASON = 500
_CHAT, _PLAIN = "/chat/completions", "/completions"
# A password would end up in messages, and a query would stand before the path that is appended.
_URL = re.compile(r"https?://[!-~]+", re.IGNORECASE)

Question = str | Sequence[Mapping[str, str]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A model behind a server, and how it is asked. Holds no connection and no state, so threads may share one.

    `url` is what stands before `/chat/completions`, such as `http://localhost:8000/v1`. `temperature`, `max_tokens` and `seed` are left to
    the server where they are None; `extra` holds further fields of the request, such as `{"top_p": 0.95}`. `timeout_seconds` bounds the
    wait for the first byte of an answer, and then the whole answer. `max_retries` counts requests after the first. The key is the value of
    the environment variable `key_variable`; without one, or with "" for the name, none is sent. With a seed, the waits between the
    retries of a request are always the same; `sleep` takes their seconds.

    Raises:
        ConfigError: if a value cannot be used.
    """

    url: str
    model: str
    temperature: float | None = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    timeout_seconds: float = 600.0
    max_retries: int = 5
    key_variable: str = "OPENAI_API_KEY"
    extra: Mapping[str, Any] = field(default_factory=dict)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_url(self.url)
        checks = (
            (bool(self.model), "model", "the name of a model that the server offers"),
            (self.temperature is None or 0 <= self.temperature < math.inf, "temperature", "a number from 0 on"),
            (self.max_tokens is None or self.max_tokens > 0, "max_tokens", "a number of tokens from 1 on"),
            (0 < self.timeout_seconds < math.inf, "timeout_seconds", "a number above 0"),
            (self.max_retries >= 0, "max_retries", "a number from 0 on"),
            (not self.extra.get("stream"), "extra", "no stream: answers are read whole"),
        )
        for is_right, name, wanted in checks:
            if not is_right:
                raise ConfigError(f"server: {name} is {getattr(self, name)!r}; give {wanted}")

    def complete(self, messages: Sequence[Mapping[str, str]]) -> Completion:
        """Have the model answer `messages`, each with a `role` and a `content`.

        Connections that fail, answers that are late, cut short or malformed, and the statuses of `RETRIED_STATUSES` are tried again after
        a wait that doubles each time, or as long as the server's Retry-After says.

        Raises:
            ServerError: if the server refuses the request, or gives no whole answer to any of the retries.
            ConfigError: if the key holds signs that a header cannot carry.
        """
        # The text differs between requests, so that threads that failed together do not come back together.
        jitter = random.Random(None if self.seed is None else self._body(messages))
        tries = 1
        while isinstance(answer := self.ask(messages), Failure):
            self.sleep(self.wait_after(answer, tries, jitter))
            tries += 1
        return answer

    def ask(self, question: Question) -> Completion | Failure:
        """Ask once: for an answer to messages, or for what follows a text as it is.

        Raises:
            ConfigError: if the key holds signs that a header cannot carry.
        """
        place = self.url.rstrip("/").removesuffix(_CHAT) + (_PLAIN if isinstance(question, str) else _CHAT)
        answer = self._post(place, self._body(question))
        return replace(answer, reason=f"{place}: {answer.reason}") if isinstance(answer, Failure) else answer

    def wait_after(self, failure: Failure, tries: int, jitter: random.Random) -> float:
        """Choose the seconds to wait before asking again, after the failure of request number `tries`.

        Raises:
            ServerError: if asking again cannot help, or was tried often enough.
        """
        advice = self._advice(failure, tries)
        if advice:
            raise ServerError(f"{failure.reason}; asked {tries} time{'s' * (tries > 1)}; {advice}")
        backoff = min(LONGEST_BACKOFF_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(tries - 1, 16))
        wait = max(failure.retry_after, backoff * jitter.uniform(0.5, 1.0))
        log.warning("%s; asking again in %.1f s", failure.reason, wait)
        return wait

    def _body(self, question: Question) -> bytes:
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        fields = {name: value for name, value in given.items() if value is not None}
        asked = {"prompt": question} if isinstance(question, str) else {"messages": [dict(turn) for turn in question]}
        return json.dumps({**self.extra, "model": self.model, **asked, **fields}).encode()

    def _advice(self, failure: Failure, tries: int) -> str:
        """What the user may do about a failure that is not tried again, "" for one that is."""
        if failure.is_final:
            return f"mend the url, the model's name, the request, or the key in {self.key_variable or 'an environment variable'}"
        if failure.retry_after > LONGEST_RETRY_AFTER_SECONDS:
            return f"the server asks to wait {failure.retry_after:.0f} seconds; come back then"
        return "see whether the server runs, or raise max_retries or timeout_seconds" if tries > self.max_retries else ""

    def _post(self, place: str, body: bytes) -> Completion | Failure:
        """Send one request. The key lives in this call alone, and failures are values, so that no traceback holds it."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if not re.fullmatch(r"[ -~]*", key):
            key = ""
            raise ConfigError(f"{self.key_variable}: the key in this environment variable has signs beyond printable ASCII; set it anew")
        headers = {"Content-Type": "application/json", "User-Agent": f"structcot/{__version__}"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        answer = _send(Request(place, data=body, headers=headers, method="POST"), self.timeout_seconds)
        if isinstance(answer, bytes):
            answer = read_completion(answer)
        if isinstance(answer, Failure):
            reason = answer.reason.replace(key, "***") if key else answer.reason
            return replace(answer, reason=_shown(reason))
        return answer


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _check_url(url: str) -> None:
    wanted = "give one such as http://localhost:8000/v1, without user, password, query or fragment"
    try:
        parts = urlsplit(url)
        is_right = _URL.fullmatch(url) and parts.hostname and parts.hostname.encode("idna") and (parts.port is None or parts.port)
    except ValueError:
        is_right = False
    if "@" in url or "?" in url or "#" in url:
        # What stands there may be a secret, so it is not shown.
        raise ConfigError(f"server: the url holds a user, a password, a query or a fragment; {wanted}")
    if not is_right:
        raise ConfigError(f"server: {url!r} is no url of a server; {wanted}")


def _send(request: Request, timeout_seconds: float) -> bytes | Failure:
    """Send a request and read the whole answer."""
    try:
        with build_opener(_NoRedirect).open(request, timeout=timeout_seconds) as response:
            return _read_body(response, time.monotonic() + timeout_seconds)
    except HTTPError as error:
        with error:
            return _refusal(error)
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, TimeoutError):
            return Failure(reason=f"no whole answer within {timeout_seconds:g} seconds", kind="late")
        if isinstance(cause, IncompleteRead):
            return Failure(reason="the answer is cut short", kind="cut short")
        return Failure(reason=f"no answer: {cause}")


def _read_body(response: HTTPResponse, deadline: float) -> bytes:
    """Read to the end. A server that sends a byte now and then does not outlive `deadline`, in seconds of the monotonic clock."""
    expected = response.length
    body = bytearray()
    while expected is None or len(body) < expected:
        piece = response.read1(65536)
        if not piece:
            break
        body += piece
        if time.monotonic() > deadline:
            raise TimeoutError
    if expected is not None and len(body) < expected:
        raise IncompleteRead(bytes(body), expected - len(body))
    return bytes(body)


def _refusal(error: HTTPError) -> Failure:
    """Read a status that is no success, with the server's own words."""
    body = b""
    with suppress(OSError, HTTPException):
        body = error.read(LONGEST_REFUSAL_BYTES)
    words = own_words(body)
    return Failure(
        reason=f"status {error.code} {error.reason}{': ' if words else ''}{words}",
        kind=f"status {error.code}",
        status=error.code,
        is_final=error.code not in RETRIED_STATUSES,
        retry_after=_seconds(error.headers.get("Retry-After", "")),
    )


def _seconds(retry_after: str) -> float:
    """Read a Retry-After header, a number of seconds or a date; 0 where it is neither (RFC 9110, section 10.2.3)."""
    with suppress(ValueError):
        number = float(retry_after)
        return max(0.0, number) if math.isfinite(number) else 0.0
    try:
        date = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return 0.0
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def _shown(reason: str) -> str:
    """One short line that a terminal can show."""
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(reason.split()))
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."
