"""Asking a model for many answers: each is paid for once, within rate and money, and nothing that failed becomes an answer."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.curate.asking import FAILURES, Answer, AnswerFile, Limits, ask_all, asked_of, cost_of
from structcot.curate.config import ServerConfig
from structcot.errors import MismatchError, ServerError, StructcotError
from structcot.eval.engine import Output, Request
from tests.faulty_server import (
    WORDS_OF_AN_ERROR,
    Exchange,
    FaultyServer,
    cuts_short,
    drips,
    hangs_up,
    late,
    refuses,
    says,
    sends,
    speaks_no_http,
)

TEXTS = st.text(max_size=50)


def server_config(url: str, **more: Any) -> ServerConfig:
    return ServerConfig(url=url, model="a-model", **{"concurrency": 4, "max_retries": 3, "timeout_seconds": 5.0, "max_tokens": 100, **more})


def requests(count: int) -> list[Request]:
    return [Request(key=f"p-{number}", messages=(("user", f"question {number}"),), seed=3) for number in range(count)]


def texts_in(config: ServerConfig, path: Path, count: int) -> list[str | None]:
    with AnswerFile(path) as answers:
        found = [answers.get(asked_of(config, request)) for request in requests(count)]
    return [answer.text if answer else None for answer in found]


def ask(config: ServerConfig, path: Path, count: int) -> None:
    with AnswerFile(path) as answers:
        ask_all(config, requests(count), answers, what="teacher")


def echo(exchange: Exchange) -> None:
    says(f"echo of {exchange.user()}")(exchange)


def failing_first(server_faults: Counter[str], *faults: Any) -> Any:
    """Each question meets one of the faults first, and is answered when it is asked again."""
    lock = threading.Lock()

    def behave(exchange: Exchange) -> None:
        with lock:
            server_faults[exchange.user()] += 1
            times = server_faults[exchange.user()]
            number = int(exchange.user().split()[-1])
        (faults[number % len(faults)] if times == 1 else echo)(exchange)

    return behave


# The file of answers


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=8, unique_by=lambda pair: pair[0]), st.integers(0, 60))
@settings(max_examples=40)
def test_answers_are_found_again_and_a_cut_line_is_taken_away(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    answers = {asked: Answer(key=asked, text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=2) for asked, text in pairs}
    with AnswerFile(path) as file:
        for asked, answer in answers.items():
            file.append(asked, answer)
        assert {asked: file.get(asked) for asked in answers} == answers
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    left = path.read_bytes().count(b"\n")
    with AnswerFile(path) as file:
        assert (file.prompt_tokens, file.completion_tokens) == (left, 2 * left)
        assert [file.get(asked) for asked in answers][:left] == list(answers.values())[:left]
        assert all(file.get(asked) is None for asked in list(answers)[left:])
        for asked in list(answers)[left:]:
            file.append(asked, answers[asked])
    assert path.read_bytes() == whole


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"something": "else"}\n')
    with pytest.raises(MismatchError, match=r"answers.jsonl:1: is no answer of a server"):
        AnswerFile(path)


# What was asked for


def test_each_question_is_asked_once_and_a_changed_one_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with FaultyServer(echo) as server:
        config = server_config(server.url)
        ask(config, path, 5)
        ask(config, path, 8)
        assert len(server.requests) == 8
        assert texts_in(config, path, 8) == [f"echo of question {number}" for number in range(8)]
        warmer = server_config(server.url, temperature=0.6)
        ask(warmer, path, 3)
        ask(config, path, 8)
        assert len(server.requests) == 11
        assert {request["seed"] for request in server.requests[:8]} != {server.requests[0]["seed"]}, "each has a seed of its own"


def test_every_kind_of_failure_is_counted_and_none_becomes_an_answer(tmp_path: Path) -> None:
    faults = (
        refuses(429),
        refuses(500),
        refuses(503),
        late(2.5),
        drips(0.2),
        cuts_short,
        hangs_up,
        speaks_no_http,
        sends(b"{"),
        sends(b'{"choices": []}'),
        says(None),
        sends(json.dumps({"error": {"message": WORDS_OF_AN_ERROR}}).encode()),
    )
    path = tmp_path / "answers.jsonl"
    with FaultyServer(failing_first(Counter(), *faults)) as server:
        config = server_config(server.url, timeout_seconds=1.0, concurrency=8)
        ask(config, path, 2 * len(faults))
        assert texts_in(config, path, 2 * len(faults)) == [f"echo of question {number}" for number in range(2 * len(faults))]
    assert WORDS_OF_AN_ERROR not in path.read_text()
    counts = json.loads((tmp_path / FAILURES).read_text())
    assert set(counts) == {
        "status 429",
        "status 500",
        "status 503",
        "late",
        "cut short",
        "no answer",
        "not JSON",
        "no choices",
        "no text",
        "error in the answer",
    }
    assert sum(counts.values()) >= 2 * len(faults)


def test_what_fails_each_time_is_told_at_the_end_and_asked_again_by_the_next_call(tmp_path: Path) -> None:
    broken = {"question 3": True}

    def behave(exchange: Exchange) -> None:
        (refuses(500) if broken.get(exchange.user()) else echo)(exchange)

    path = tmp_path / "answers.jsonl"
    with FaultyServer(behave) as server:
        config = server_config(server.url, max_retries=1)
        with pytest.raises(StructcotError, match=r"teacher: 1 requests failed 2 times each while others were answered \(2 x status 500\)"):
            ask(config, path, 8)
        assert texts_in(config, path, 8)[3] is None
        assert sum(text is not None for text in texts_in(config, path, 8)) == 7
        broken.clear()
        ask(config, path, 8)
        assert texts_in(config, path, 8)[3] == "echo of question 3"
        asked = Counter(request["messages"][-1]["content"] for request in server.requests)
    assert all(asked[f"question {number}"] == 1 for number in range(8) if number != 3)


def test_a_server_that_refuses_all_ends_it_at_once(tmp_path: Path) -> None:
    with FaultyServer(refuses(401)) as server:
        with pytest.raises(ServerError, match="status 401"):
            ask(server_config(server.url), tmp_path / "answers.jsonl", 20)
        assert len(server.requests) <= 4


# Rate and money


def test_no_more_is_spent_than_allowed_and_a_higher_limit_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with FaultyServer(echo) as server:
        prices = {"prompt_dollars": 1000.0, "completion_dollars": 10_000.0}  # an answer costs 7 * 0.001 + 5 * 0.01 = 0.057
        config = server_config(server.url, max_dollars=3.0, **prices)
        stopped = r"teacher: stopped at \$[0-2]\.\d\d, since the next answer might go beyond max_dollars = 3"
        with pytest.raises(StructcotError, match=stopped):
            ask(config, path, 100)
        with AnswerFile(path) as answers:
            spent = cost_of(config, answers.prompt_tokens, answers.completion_tokens)
            assert 1.8 < spent <= 3.0
        before = len(server.requests)
        ask(server_config(server.url, max_dollars=100.0, **prices), path, 100)
        assert len(server.requests) == 100
        assert before < 100


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.floats(0.01, 5.0))
def test_the_money_set_aside_covers_whatever_comes(tokens: list[int], most: float) -> None:
    config = server_config("http://x", completion_dollars=1000.0, prompt_dollars=1000.0, max_dollars=most)
    limits = Limits(config=config, spent_dollars=0.0)
    flying: list[tuple[Request, int]] = []
    for request, count in zip(requests(len(tokens)), tokens, strict=True):
        while flying and limits.spent_dollars + sum(limits.reserved.values()) + 0.2 > most:  # else `admit` waits for other threads
            landed, used = flying.pop(0)
            limits.done(landed, output_of(landed, used))
        if not limits.admit(request):
            break
        flying.append((request, count))
        if len(flying) == 3:
            landed, used = flying.pop(0)
            limits.done(landed, output_of(landed, used))
    for request, count in flying:
        limits.done(request, output_of(request, count))
    assert limits.spent_dollars <= most


def output_of(request: Request, completion_tokens: int) -> Output:
    text = request.messages[0][1]
    return Output(
        key=request.key, text=text, finish_reason="stop", prompt_tokens=len(text), completion_tokens=completion_tokens, seconds=0.0
    )


def test_a_rate_is_kept(tmp_path: Path) -> None:
    with FaultyServer(echo) as server:
        start = time.monotonic()
        ask(server_config(server.url, requests_per_minute=600), tmp_path / "answers.jsonl", 8)
        assert time.monotonic() - start >= 0.65, "seven waits of a tenth of a second"


# Secrets


def test_the_key_is_in_no_file_and_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    key = "sk-this-is-a-secret-0123456789"
    monkeypatch.setenv("TEACHER_KEY", key)

    def leaks(exchange: Exchange) -> None:
        refuses(500, f"the key {exchange.headers['Authorization']} is fine, the server is not")(exchange)

    with FaultyServer(leaks, echo) as server:
        config = server_config(server.url, key="TEACHER_KEY", max_retries=1)
        ask(config, tmp_path / "answers.jsonl", 3)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    with FaultyServer(leaks) as server, pytest.raises(StructcotError) as error:
        ask(server_config(server.url, key="TEACHER_KEY", max_retries=0), tmp_path / "more.jsonl", 3)
    assert key not in str(error.value)
    assert key not in "".join(capsys.readouterr())
    assert not any(key in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert key not in repr(config)
