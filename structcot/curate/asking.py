"""Many questions to a model behind a server, each answered once: within a rate, within a sum of money, and kept as soon as it is there.

An answer is known by the hash of all that was asked: model, messages, sampling, seed. So a call that goes on asks for what is missing, a
changed prompt is asked anew, and what was paid for before is still there when it is changed back. Keys are read from the environment when a
request is sent and are in none of this (`structcot.server`).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Self

from tqdm import tqdm

from structcot.completion import Failure
from structcot.curate.config import ServerConfig
from structcot.errors import MismatchError, ServerError, StructcotError
from structcot.eval.engine import Output, Request, Sampling
from structcot.eval.remote import Gate, open_server
from structcot.files import json_sha256, write_json

ANSWERS, FAILURES = "answers.jsonl", "failures.json"
PER_MILLION = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model wrote to one question, and why it ended: "stop", "length" or "refused", for the `reason` given."""

    key: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reason: str = ""


class AnswerFile:
    """answers.jsonl, open to append to: in memory are places, not texts. A last line that a kill has cut short is taken away.

    Raises:
        MismatchError: if it holds what was never written here.
    """

    def __init__(self, path: Path):
        self.path = path
        self.prompt_tokens = self.completion_tokens = 0
        self._places: dict[str, int] = {}
        self._file: IO[bytes] | None = None
        if path.exists():
            self._find_places()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+")
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, asked: str) -> bool:
        return asked in self._places

    def append(self, asked: str, answer: Answer) -> None:
        """Keep an answer, whatever happens next."""
        file = self._opened()
        place = file.seek(0, os.SEEK_END)
        file.write(json.dumps({"asked": asked, **asdict(answer)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        self._note(asked, place, answer.prompt_tokens, answer.completion_tokens)

    def get(self, asked: str) -> Answer | None:
        """The answer to what was asked, None if there is none."""
        if asked not in self._places:
            return None
        file = self._opened()
        file.seek(self._places[asked])
        values = json.loads(file.readline())
        return Answer(**{name: value for name, value in values.items() if name != "asked"})

    def need(self, config: ServerConfig, request: Request) -> Answer:
        """The answer to a request that `ask_all` was given."""
        answer = self.get(asked_of(config, request))
        if answer is None:
            raise RuntimeError(f"{request.key}: was asked for and is not there")
        return answer

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            raise RuntimeError(f"{self.path}: is not open")
        return self._file

    def _find_places(self) -> None:
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    values = json.loads(line)
                    self._note(values["asked"], end, values["prompt_tokens"], values["completion_tokens"])
                except (ValueError, LookupError, TypeError) as error:
                    raise MismatchError(f"{self.path}:{number}: is no answer of a server: {error!r}; mend the line or remove it") from error
                end += len(line)
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)

    def _note(self, asked: str, place: int, prompt_tokens: int, completion_tokens: int) -> None:
        self._places[asked] = place
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens


@dataclass(slots=True, kw_only=True)
class Limits:
    """The rate and the money of one run of questions, and what failed, shared by all threads that ask.

    For each request in flight the most that it can cost is set aside: a token of the prompt has at least one byte, and the answer at most
    `max_tokens`. `next_start` is in seconds of the monotonic clock.
    """

    config: ServerConfig
    spent_dollars: float
    reserved: dict[str, float] = field(default_factory=dict)
    next_start: float = 0.0
    is_spent: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    num_spared: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def admit(self, request: Request) -> bool:
        """Set the cost of a request aside and wait for its turn; False where it might cost more than is left when all in flight is paid."""
        config = self.config
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for turn in request.messages for text in turn)
        most = PER_MILLION * (num_bytes * config.prompt_dollars + config.max_tokens * config.completion_dollars)
        with self.changed:
            while config.max_dollars and self.spent_dollars + sum(self.reserved.values()) + most > config.max_dollars:
                if not self.reserved:
                    self.is_spent = True
                    return False
                self.changed.wait()
            self.reserved[request.key] = most
            start = max(self.next_start, time.monotonic())
            self.next_start = start + (60.0 / config.requests_per_minute if config.requests_per_minute else 0.0)
        time.sleep(max(0.0, start - time.monotonic()))
        return True

    def done(self, request: Request, output: Output | None) -> None:
        """Put what an answer cost in the place of what was set aside for it."""
        with self.changed:
            del self.reserved[request.key]
            if output is not None:
                self.spent_dollars += cost_of(self.config, output.prompt_tokens, output.completion_tokens)
            self.changed.notify_all()

    def note(self, failure: Failure) -> None:
        """Count a failure."""
        with self.changed:
            self.failures[failure.kind] += 1

    def spare(self, request: Request, error: ServerError) -> bool:
        """Go on without a request that failed each time."""
        with self.changed:
            self.num_spared += 1
        return True


def ask_all(config: ServerConfig, requests: Sequence[Request], answers: AnswerFile, *, what: str) -> None:
    """Ask for every answer that is not in the file yet; `what` heads the progress and the messages.

    Raises:
        StructcotError: if the money is spent, or requests failed each time; the same call asks for what is missing.
        ServerError: if the server refuses all requests or cannot be reached.
    """
    wanted = {asked_of(config, request): request for request in requests}
    missing = {asked: request for asked, request in wanted.items() if asked not in answers}
    by_key = {request.key: asked for asked, request in missing.items()}
    limits = Limits(config=config, spent_dollars=cost_of(config, answers.prompt_tokens, answers.completion_tokens))
    engine = open_server(
        config.url,
        config.model,
        concurrency=config.concurrency,
        key_variable=config.key,
        timeout_seconds=config.timeout_seconds,
        max_retries=config.max_retries,
        gate=Gate(admit=limits.admit, note=limits.note, spare=limits.spare, done=limits.done),
    )
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_tokens)
    try:
        outputs = engine(list(missing.values()), sampling) if missing else ()
        for output in tqdm(outputs, total=len(missing), desc=what, unit="answer", mininterval=1.0, dynamic_ncols=True):
            if output.finish_reason != "failed":
                answers.append(by_key[output.key], _answer(output))
    finally:
        _add_failures(answers.path.with_name(FAILURES), limits.failures)
    _need_all(config, limits, what)


def asked_of(config: ServerConfig, request: Request) -> str:
    """The hash of all that decides an answer: the model by its name, wherever it is served, and what it is asked."""
    sampling = [config.temperature, config.top_p, config.max_tokens]
    return json_sha256([config.model, sampling, request.seed, request.key, request.messages])


def cost_of(config: ServerConfig, prompt_tokens: int, completion_tokens: int) -> float:
    """What so many tokens cost, in dollars."""
    return PER_MILLION * (prompt_tokens * config.prompt_dollars + completion_tokens * config.completion_dollars)


def _answer(output: Output) -> Answer:
    return Answer(
        key=output.key,
        text=output.text,
        finish_reason=output.finish_reason,
        prompt_tokens=output.prompt_tokens,
        completion_tokens=output.completion_tokens,
        reason=output.reason,
    )


def _need_all(config: ServerConfig, limits: Limits, what: str) -> None:
    if limits.is_spent:
        raise StructcotError(
            f"{what}: stopped at ${limits.spent_dollars:.2f}, since the next answer might go beyond max_dollars = {config.max_dollars:g};"
            " what was answered is kept: raise max_dollars and run the same command again"
        )
    if limits.num_spared:
        raise StructcotError(
            f"{what}: {limits.num_spared} requests failed {config.max_retries + 1} times each while others were answered"
            f" ({_told(limits.failures)}); the same command asks them again"
        )


def _told(failures: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(failures.items()))


def _add_failures(path: Path, failures: Counter[str]) -> None:
    """Add to the counts of all calls before."""
    if failures:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, dict(sorted((Counter(known) + failures).items())))
