"""The client of a server: whatever the server does, a completion is what the model wrote, and everything else is an error that says so."""

from __future__ import annotations

import json
import logging
import pickle
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from structcot.errors import ConfigError, ServerError
from structcot.server import Completion, Failure, Server
from tests.faulty_server import (
    WORDS_OF_AN_ERROR,
    Behaviour,
    Exchange,
    FaultyServer,
    completion,
    cuts_a_chunk_short,
    cuts_short,
    drips,
    hangs_up,
    late,
    refuses,
    says,
    sends,
    speaks_no_http,
)

KEY = "sk-secret-0123456789"
HELLO = [{"role": "user", "content": "Hello, 世界 \ud83d"}]
GOOD = Completion(text="fine", finish_reason="stop", prompt_tokens=7, completion_tokens=5)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def client(server: FaultyServer, waits: list[float] | None = None, **changes: Any) -> Server:
    options: dict[str, Any] = {"seed": 1, "timeout_seconds": 5.0, "max_retries": 2}
    sleep = (waits if waits is not None else []).append
    return Server(**({"url": server.url, "model": "a-model", "sleep": sleep} | options | changes))


def raised(behaviour: Behaviour, **changes: Any) -> tuple[ServerError, int]:
    """The error of a request that always meets `behaviour`, and how often it was sent."""
    with FaultyServer(behaviour) as server, pytest.raises(ServerError) as caught:
        client(server, **changes).complete(HELLO)
    return caught.value, len(server.requests)


def test_a_request_holds_what_was_asked_for_and_nothing_that_was_not() -> None:
    with FaultyServer(says("fine")) as server:
        assert client(server, seed=None).complete(HELLO) == GOOD
        client(server, url=f"{server.url}/", max_tokens=9, seed=3, temperature=0.5, extra={"top_p": 0.9, "model": "x"}).complete(HELLO)
        client(server, url=f"{server.url}/chat/completions", temperature=None, seed=None).complete(HELLO)
    assert server.requests[0] == {"model": "a-model", "messages": HELLO, "temperature": 0.0}
    assert server.requests[1] == server.requests[0] | {"temperature": 0.5, "max_tokens": 9, "seed": 3, "top_p": 0.9}
    assert server.requests[2] == {"model": "a-model", "messages": HELLO}
    assert server.paths == ["/v1/chat/completions"] * 3
    assert "Authorization" not in server.headers[0]


def passing_failures() -> dict[str, Behaviour]:
    return {
        **{f"status {status}": refuses(status) for status in (408, 409, 429, 500, 502, 503, 529)},
        "connection closed": hangs_up,
        "body cut short": cuts_short,
        "chunk cut short": cuts_a_chunk_short,
        "no HTTP": speaks_no_http,
        "no choices": sends(b'{"choices": []}'),
        "choices are null": sends(b'{"choices": null}'),
        "choices are text": sends(json.dumps({"choices": [WORDS_OF_AN_ERROR]}).encode()),
        "nothing": sends(b""),
        "a list": sends(json.dumps([completion(WORDS_OF_AN_ERROR)]).encode()),
        "null content": says(None, "length"),
        "content is a number": says(5),
        "content is a list": says([{"type": "text", "text": WORDS_OF_AN_ERROR}]),
        "no message": sends(b'{"choices": [{"finish_reason": "stop"}]}'),
        "message is text": sends(json.dumps({"choices": [{"message": WORDS_OF_AN_ERROR}]}).encode()),
        "not JSON": sends(f"<html>{WORDS_OF_AN_ERROR}</html>".encode()),
        "JSON that stops": sends(json.dumps(completion(WORDS_OF_AN_ERROR)).encode()[:-1]),
        "JSON too deep": sends(b"[" * 100_000),
        "not UTF-8": sends(b'{"choices": "\xff\xfe"}'),
        "an error with status 200": sends(json.dumps({"error": {"message": WORDS_OF_AN_ERROR}}).encode()),
        "an error beside choices": says(WORDS_OF_AN_ERROR, error={"message": "overloaded"}),
        "finished by an error": says(WORDS_OF_AN_ERROR, "error"),
        "aborted": says(WORDS_OF_AN_ERROR, "abort"),
    }


@pytest.mark.parametrize("name", passing_failures())
def test_a_failure_that_may_pass_is_tried_again_and_then_raised(name: str) -> None:
    behaviour = passing_failures()[name]
    waits: list[float] = []
    with FaultyServer(behaviour, behaviour, says("fine")) as server:
        assert client(server, waits).complete(HELLO) == GOOD
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0
    assert server.requests[0] == server.requests[2]
    error, requests = raised(behaviour)
    assert requests == 3
    assert "/v1/chat/completions: " in str(error)
    assert "asked 3 times; see whether the server runs" in str(error)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_raised_at_once_with_the_words_of_the_server(status: int) -> None:
    error, requests = raised(refuses(status))
    assert requests == 1
    assert f"status {status} " in str(error)
    assert WORDS_OF_AN_ERROR in str(error)
    assert "OPENAI_API_KEY" in str(error)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": "no such model"}', ": no such model;"),
        (b'{"object": "error", "message": "no such model"}', ": no such model;"),
        (b'{"detail": [{"loc": 1}]}', ': [{"loc": 1}];'),
        (b"plain\n\twords \x1b[31m", ": plain words \ufffd[31m;"),
        (b"x" * 10_000, "x" * 400 + "x"),
        (b"", "Bad Request;"),
    ],
)
def test_the_words_of_a_refusal_are_found_in_any_form(body: bytes, words: str) -> None:
    error, _ = raised(lambda exchange: exchange.send(400, body))
    assert words in str(error)
    assert len(str(error)) < 1000
    assert str(error).isprintable()


@pytest.mark.parametrize("behaviour", [late(0.6), drips(0.02)])
def test_an_answer_that_is_late_or_never_ends_is_a_failure(behaviour: Behaviour) -> None:
    error, requests = raised(behaviour, timeout_seconds=0.2, max_retries=1)
    assert requests == 2
    assert "no whole answer within 0.2 seconds" in str(error)


def test_a_server_that_is_not_there_is_a_failure() -> None:
    with FaultyServer(says("fine")) as server:
        gone = client(server)
    with pytest.raises(ServerError, match="Connection refused; asked 3 times"):
        gone.complete(HELLO)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7.0, 7.0),
        ("1.5", 1.5, 1.5),
        ("0", 0.25, 0.5),
        ("-3", 0.25, 0.5),
        ("soon", 0.25, 0.5),
        ("nan", 0.25, 0.5),
        ("Thu, 99999999999 Jan 1970 00:00:00 GMT", 0.25, 0.5),
        (timedelta(seconds=300), 200.0, 300.0),
        (timedelta(seconds=-300), 0.25, 0.5),
    ],
)
def test_the_wait_is_as_long_as_the_server_asks(header: str | timedelta, least: float, most: float) -> None:
    if isinstance(header, timedelta):  # from now on, not from when the tests were collected
        header = format_datetime(datetime.now(UTC) + header)
    waits: list[float] = []
    with FaultyServer(refuses(429, Retry_After=header), says("fine")) as server:
        assert client(server, waits).complete(HELLO) == GOOD
    assert len(waits) == 1
    assert least <= waits[0] <= most


def test_a_server_that_asks_to_wait_for_hours_is_not_waited_for() -> None:
    error, requests = raised(refuses(429, Retry_After="7200"))
    assert requests == 1
    assert "the server asks to wait 7200 seconds" in str(error)


def waits_of(message: str, **changes: Any) -> list[float]:
    waits: list[float] = []
    with FaultyServer(refuses(500)) as server, pytest.raises(ServerError):
        client(server, waits, max_retries=9, **changes).complete([{"role": "user", "content": message}])
    return waits


def test_the_waits_double_up_to_a_bound_and_are_the_same_for_the_same_seed() -> None:
    waits = waits_of("a")
    for number, wait in enumerate(waits):
        longest = min(30.0, 0.5 * 2**number)
        assert longest / 2 <= wait <= longest
    assert waits == waits_of("a")
    assert len({tuple(waits), *(tuple(waits_of(*other)) for other in ("b", "c")), tuple(waits_of("a", seed=2))}) == 4
    assert waits_of("a", seed=None) != waits_of("a", seed=None)


def repeats_the_key(status: int) -> Behaviour:
    def answer(exchange: Exchange) -> None:
        sent = exchange.headers["Authorization"]
        exchange.send(status, json.dumps({"error": {"message": f"the header was {sent}"}}).encode(), headers={"X-Sent": sent})

    return answer


def repeats_the_key_in_its_status(exchange: Exchange) -> None:
    exchange.wfile.write(f"HTTP/1.1 401 {KEY}\r\nContent-Length: 0\r\n\r\n".encode())
    hangs_up(exchange)


def repeats_the_key_for_http(exchange: Exchange) -> None:
    exchange.wfile.write(f"{KEY}\r\n\r\n".encode())
    hangs_up(exchange)


@pytest.mark.parametrize(
    "behaviour",
    [repeats_the_key(401), repeats_the_key(500), repeats_the_key(200), repeats_the_key_in_its_status, repeats_the_key_for_http]
    + [sends(f"{'x' * start}{KEY}".encode()) for start in (0, 455, 460, 465)],
)
def test_the_key_reaches_the_server_and_nothing_else(
    behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    with FaultyServer(behaviour) as server:
        asked = client(server, key_variable="MY_KEY", max_retries=1)
        with pytest.raises(ServerError) as caught:
            asked.complete(HELLO)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    told = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    everything = [told, repr(caught.value), repr(caught.value.__context__), repr(asked), str(pickle.dumps(caught.value)), caplog.text]
    for text in [*everything, *capfd.readouterr(), json.dumps(server.requests)]:
        assert KEY[:8] not in text


@pytest.mark.parametrize("key", ["sk-sécret", "sk-secret\nX-More: 1", "sk-\x00secret"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "\x00" in key:
        monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with FaultyServer(says("fine")) as server, pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        client(server).complete(HELLO)
    told = traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
    assert "cret" not in "".join(part for part in told if __file__ not in part)
    assert not server.requests


def test_no_key_is_sent_where_no_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultyServer(says("fine")) as server:
        client(server, key_variable="").complete(HELLO)
        client(server, key_variable="NOT_SET_ANYWHERE").complete(HELLO)
        client(server).complete(HELLO)
    assert [headers.get("Authorization") for headers in server.headers] == [None, None, f"Bearer {KEY}"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_carries_the_key_nowhere(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultyServer(says("fine")) as other:
        error, requests = raised(refuses(status, Location=f"{other.url}/chat/completions"))
    assert requests == 1
    assert f"status {status}" in str(error)
    assert not other.requests
    assert not other.stray_requests


@pytest.mark.parametrize("usage", [None, [], {}, {"prompt_tokens": "7", "completion_tokens": True}])
def test_a_server_that_does_not_count_gives_a_completion_without_counts(usage: Any) -> None:
    with FaultyServer(says("fine", None, usage=usage)) as server:
        expected = Completion(text="fine", finish_reason="", prompt_tokens=None, completion_tokens=None)
        assert client(server).complete(HELLO) == expected


def test_a_plain_text_is_continued_by_the_other_endpoint() -> None:
    body = {"choices": [{"text": " there", "finish_reason": "stop"}], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    with FaultyServer(sends(json.dumps(body).encode())) as server:
        answer = client(server, url=f"{server.url}/chat/completions", seed=None).ask("Hello")
    assert answer == Completion(text=" there", finish_reason="stop", prompt_tokens=7, completion_tokens=5)
    assert server.paths == ["/v1/completions"]
    assert server.requests == [{"model": "a-model", "prompt": "Hello", "temperature": 0.0}]


def test_asking_once_gives_a_failure_with_its_status_as_a_value() -> None:
    with FaultyServer(refuses(429, "slowly", Retry_After="7"), refuses(400), hangs_up) as server:
        limited, refused, gone = (client(server).ask(HELLO) for _ in range(3))
    assert isinstance(limited, Failure)
    assert (limited.status, limited.is_final, limited.retry_after) == (429, False, 7.0)
    assert limited.reason == f"{server.url}/chat/completions: status 429 Too Many Requests: slowly"
    assert isinstance(refused, Failure)
    assert (refused.status, refused.is_final) == (400, True)
    assert isinstance(gone, Failure)
    assert (gone.status, gone.is_final) == (0, False)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_that_the_server_cut_off_is_kept_apart(name: str) -> None:
    body = completion(None, "length")
    body["choices"][0]["message"][name] = "So"
    with FaultyServer(sends(json.dumps(body).encode())) as server:
        answer = client(server).complete(HELLO)
    assert (answer.text, answer.thought, answer.finish_reason) == ("", "So", "length")


@pytest.mark.parametrize("text", ["", "  \n", "错误\U0001f914\u2028", "lone \ud83d", "x" * 300_000])
def test_a_text_comes_as_the_model_wrote_it(text: str) -> None:
    with FaultyServer(says(text, "length")) as server:
        answer = client(server).complete(HELLO)
    assert answer.text == text
    assert answer.finish_reason == "length"


def test_threads_share_a_client() -> None:
    lock, seen = threading.Lock(), set()

    def fails_once(exchange: Exchange) -> None:
        with lock:
            is_first = exchange.user() not in seen
            seen.add(exchange.user())
        (refuses(503) if is_first else says(exchange.user()))(exchange)

    with FaultyServer(fails_once) as server, ThreadPoolExecutor(8) as pool:
        shared = client(server)
        texts = [str(number) for number in range(40)]
        answers = pool.map(lambda text: shared.complete([{"role": "user", "content": text}]).text, texts)
        assert list(answers) == texts
    assert len(server.requests) == 80


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": ""}, "no url of a server"),
        ({"url": "localhost:8000"}, "no url of a server"),
        ({"url": "file:///etc/passwd"}, "no url of a server"),
        ({"url": "http://"}, "no url of a server"),
        ({"url": "http://a b/v1"}, "no url of a server"),
        ({"url": "http://a..b/v1"}, "no url of a server"),
        ({"url": "http://host:99999/v1"}, "no url of a server"),
        ({"url": "http://host/\r\nX: 1"}, "no url of a server"),
        ({"url": "http://me:hunter2@host/v1"}, "holds a user, a password"),
        ({"url": "http://host/v1?key=hunter2"}, "holds a user, a password"),
        ({"model": ""}, "model is ''"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds is inf"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"extra": {"stream": True}}, "no stream"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_when_the_client_is_made(changes: dict[str, Any], words: str) -> None:
    options: dict[str, Any] = {"url": "http://localhost:8000/v1", "model": "a-model"}
    with pytest.raises(ConfigError, match=words) as caught:
        Server(**(options | changes))
    assert "hunter2" not in str(caught.value)
