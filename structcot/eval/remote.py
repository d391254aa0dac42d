"""The engine behind a server: any that answers as the OpenAI API does, with a number of requests in flight and their outputs as they end.

Threads share one client. What may pass is asked for again; a rate limit pauses all threads; a request that the server refuses for its own
content is an output with the reason, and the others go on; any other refusal ends the run after what was finished by then. A refusal whose
words say nothing of length or content is blamed on the request only once another request was answered: until then it may be the model's
name or a field that the server does not know, which would refuse them all.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from structcot.completion import Completion, Failure
from structcot.errors import ConfigError, ServerError, StructcotError
from structcot.eval.engine import Engine, Output, Request, Sampling
from structcot.eval.seeds import seed_of
from structcot.server import Question, Server

RATE_LIMIT = 429
REFUSALS = frozenset({400, 413, 422})
COUNTS_NOTHING = "the server counts no tokens"
_OF_CONTENT = re.compile(
    r"context|too[ _](?:long|large|many tokens)|exceed|max(?:imum)?[ _](?:\w+[ _])?(?:tokens|length|model[ _]len)"
    r"|content[ _-]?(?:filter|policy|management)|moderation|safety",
    re.IGNORECASE,
)
# Fields that a server may do without where it refuses them: it then writes to the end of the context, or takes random numbers of its own.
_DISPENSABLE = {"max_tokens": re.compile("context|max_|too large|exceed", re.IGNORECASE), "seed": re.compile("seed", re.IGNORECASE)}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What stands between requests and a server; by default nothing. The functions are called by many threads.

    `admit` waits until a request may be sent for the first time; where it says False, nothing is let through any more, and asking ends
    without an error. `note` is told of every failure, tried again or not. `spare` says whether the run goes on without a request that
    failed each time, while others were answered: its output then has "failed" as its reason to finish. `done` is told of each request that
    was let through, with its output, or None where the run ends without one.
    """

    admit: Callable[[Request], bool] = lambda request: True
    note: Callable[[Failure], None] = lambda failure: None
    spare: Callable[[Request, ServerError], bool] = lambda request, error: False
    done: Callable[[Request, Output | None], None] = lambda request, output: None


@dataclass(slots=True, kw_only=True)
class _Run:
    """What the threads of one call share, under one lock: what is to do, who may still have an answer, and until when nobody may ask.

    `hopeful` counts the threads that neither have ended nor wait in doubt about a refusal; `pause_ends` is in seconds of the monotonic
    clock; `pauses` counts pauses without an answer between them.
    """

    todo: deque[Request]
    hopeful: int
    gate: Gate
    answered: bool = False
    stopped: bool = False
    pause_ends: float = 0.0
    pauses: int = 0
    closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    results: SimpleQueue[Output | StructcotError | None] = field(default_factory=SimpleQueue)


def open_server(
    url: str,
    model: str,
    *,
    concurrency: int = 16,
    key_variable: str = "OPENAI_API_KEY",
    timeout_seconds: float = 3600.0,
    max_retries: int = 8,
    gate: Gate | None = None,
) -> Engine:
    """Make an engine of the model behind a server, `url` being what stands before `/chat/completions`.

    `concurrency` requests are in flight, each with a seed of its own, once `gate` has let them through. The key is the value of the
    environment variable `key_variable`.
    `timeout_seconds` bounds one whole answer; `max_retries` counts requests after the first.

    The engine raises ServerError where the server cannot be reached, knows neither key nor model, or fails the same request each time; what
    was asked for by then is waited for and yielded first.

    Raises:
        ConfigError: if a value cannot be used.
    """
    if concurrency < 1:
        raise ConfigError(f"concurrency: got {concurrency}; use a number of requests from 1 on")
    server = Server(url=url, model=model, key_variable=key_variable, timeout_seconds=timeout_seconds, max_retries=max_retries)

    def generate(requests: Sequence[Request], sampling: Sampling) -> Iterator[Output]:
        return _outputs(replace(server, **_fields(sampling)), requests, sampling, concurrency, gate or Gate())

    return generate


def _fields(sampling: Sampling) -> dict[str, Any]:
    """The fields of all requests. `top_p` is always sent, since a server may have a default of its own; what some servers refuse is not."""
    extra: dict[str, Any] = {"top_p": sampling.top_p}
    if sampling.top_k:
        extra["top_k"] = sampling.top_k
    if sampling.stop:
        extra["stop"] = list(sampling.stop)
    return {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens, "extra": extra}


def _outputs(server: Server, requests: Sequence[Request], sampling: Sampling, concurrency: int, gate: Gate) -> Iterator[Output]:
    """Yield outputs as they are finished. Daemon threads ask, so that Ctrl-C need not wait for answers."""
    num_threads = min(concurrency, len(requests))
    run = _Run(todo=deque(requests), hopeful=num_threads, gate=gate)
    for _ in range(num_threads):
        threading.Thread(target=_work, args=(run, server, sampling), daemon=True).start()
    failure: StructcotError | None = None
    num_missing = len(requests)
    try:
        while num_threads:
            result = _result(run)
            if isinstance(result, Output):
                num_missing -= 1
                yield result
            elif result is None:
                num_threads -= 1
            else:
                failure = failure or result
    finally:
        _stop(run)
    if failure or (num_missing and not run.closed):
        raise failure or ServerError(f"{num_missing} requests were given up by threads that failed, as told above")


def _result(run: _Run) -> Output | StructcotError | None:
    """Wait for the next one, a second at a time: a signal that comes just before a wait is seen only after it."""
    while True:
        try:
            return run.results.get(timeout=1.0)
        except Empty:
            continue


def _work(run: _Run, server: Server, sampling: Sampling) -> None:
    """Ask for one request after the other until none is left, or one has ended the run."""
    try:
        while (request := _next(run)) is not None:
            result = None
            try:
                result = _result_of(run, server, request, sampling)
            finally:
                run.gate.done(request, result if isinstance(result, Output) else None)
            if result:
                run.results.put(result)
    finally:
        with run.changed:
            run.hopeful -= 1
            run.changed.notify_all()
        run.results.put(None)


def _result_of(run: _Run, server: Server, request: Request, sampling: Sampling) -> Output | StructcotError | None:
    """The output of a request, or why there is none; such an error ends the run, unless the request is spared."""
    try:
        return _answer(run, replace(server, seed=seed_of(request)), request, sampling)
    except StructcotError as error:
        if isinstance(error, ServerError) and run.answered and run.gate.spare(request, error):
            return _refused(request, Failure(reason=str(error)), "failed")
        _stop(run)
        return type(error)(f"{request.key}: {error}")


def _next(run: _Run) -> Request | None:
    with run.changed:
        if run.stopped or run.closed or not run.todo:
            return None
        request = run.todo.popleft()
    if run.gate.admit(request):
        return request
    with run.changed:
        run.closed = True
    return None


def _stop(run: _Run) -> None:
    with run.changed:
        run.stopped = True
        run.changed.notify_all()


def _answer(run: _Run, server: Server, request: Request, sampling: Sampling) -> Output | None:
    """Ask until there is an output; None where the run ends before.

    Raises:
        ServerError: if the run cannot go on.
    """
    question: Question = [{"role": role, "content": content} for role, content in request.messages] or request.prompt
    jitter = random.Random(server.seed)
    tries = 0
    while _may_ask(run):
        start = time.monotonic()
        answer = server.ask(question)
        if isinstance(answer, Failure):
            run.gate.note(answer)
        else:
            _note_answer(run)
            return _output(request, answer, sampling, time.monotonic() - start)
        if answer.status in REFUSALS:
            spared = _without_refused_field(server, answer)
            if spared is None:
                return _refused(request, answer) if _is_its_own(run, answer) else _give_up(server, answer, jitter)
            server = spared
        elif answer.status == RATE_LIMIT or (answer.retry_after and not answer.is_final):
            _pause_all(run, server, answer, jitter)
        else:
            tries += 1
            _sleep(run, server.wait_after(answer, tries, jitter))
    return None


def _may_ask(run: _Run) -> bool:
    """Wait for the end of a pause; False where the run has stopped."""
    with run.changed:
        while not run.stopped and (seconds := run.pause_ends - time.monotonic()) > 0:
            run.changed.wait(seconds)
        return not run.stopped


def _sleep(run: _Run, seconds: float) -> None:
    with run.changed:
        run.changed.wait_for(lambda: run.stopped, seconds)


def _note_answer(run: _Run) -> None:
    with run.changed:
        run.answered, run.pauses = True, 0
        run.changed.notify_all()


def _pause_all(run: _Run, server: Server, failure: Failure, jitter: random.Random) -> None:
    """Let nobody ask for a while. Requests that were in flight at the same time meet the same limit, and make one pause together.

    Raises:
        ServerError: if pause followed pause without an answer, more often than `max_retries`, or the server asks for hours.
    """
    with run.changed:
        now = time.monotonic()
        if now >= run.pause_ends:
            run.pauses += 1
            run.pause_ends = now + server.wait_after(failure, run.pauses, jitter)
        elif failure.retry_after:
            run.pause_ends = max(run.pause_ends, now + server.wait_after(failure, run.pauses, jitter))


def _without_refused_field(server: Server, refusal: Failure) -> Server | None:
    """The same server asked without a field that the refusal names and that can be spared, None where there is none."""
    for name, words in _DISPENSABLE.items():
        value = getattr(server, name)
        if value is not None and words.search(refusal.reason):
            log.warning("%s; asking without %s=%s", refusal.reason, name, value)
            return replace(server, **{name: None})
    return None


def _is_its_own(run: _Run, refusal: Failure) -> bool:
    """Whether a refusal is for the content of this request; in doubt, waits until another one was answered or none can be."""
    if _OF_CONTENT.search(refusal.reason):
        return True
    with run.changed:
        run.hopeful -= 1
        run.changed.notify_all()
        run.changed.wait_for(lambda: run.answered or run.stopped or not run.hopeful)
        run.hopeful += 1
        return run.answered


def _give_up(server: Server, failure: Failure, jitter: random.Random) -> None:
    server.wait_after(replace(failure, is_final=True), 1, jitter)


def _refused(request: Request, refusal: Failure, finish_reason: str = "refused") -> Output:
    return Output(
        key=request.key, text="", finish_reason=finish_reason, prompt_tokens=0, completion_tokens=0, seconds=0.0, reason=refusal.reason
    )


def _output(request: Request, answer: Completion, sampling: Sampling, seconds: float) -> Output:
    """Read a completion as every engine gives it: the thought in front of the text, nothing from a stop string on."""
    thought = f"<think>\n{answer.thought}" if answer.thought else ""
    whole = f"{thought}\n</think>\n\n{answer.text}" if thought and answer.text else thought or answer.text
    ends = [end for end in (whole.find(stop) for stop in sampling.stop) if end >= 0]
    if answer.finish_reason == "content_filter":
        return _refused(request, Failure(reason="the server's content filter has cut the answer"))
    counts = (answer.prompt_tokens, answer.completion_tokens)
    is_cut = answer.finish_reason == "length" or (not answer.finish_reason and counts[1] == sampling.max_new_tokens)
    return Output(
        key=request.key,
        text=whole[: min(ends, default=len(whole))],
        finish_reason="length" if is_cut and not ends else "stop",
        prompt_tokens=counts[0] or 0,
        completion_tokens=counts[1] or 0,
        seconds=seconds,
        reason="" if None not in counts else COUNTS_NOTHING,
    )
