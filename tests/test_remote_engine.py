"""The engine behind a server: each request is answered once, whatever the server does, with nothing but what the server wrote."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot import server as server_module
from structcot.errors import ConfigError, ServerError
from structcot.eval.engine import Engine, Output, Request, Sampling
from structcot.eval.remote import COUNTS_NOTHING, open_server
from structcot.eval.seeds import seed_of
from tests.faulty_server import Behaviour, Exchange, FaultyServer, completion, hangs_up, late, refuses, says, sends

KEY = "sk-secret-0123456789"
GREEDY = Sampling(max_new_tokens=20)
TOO_LONG = "This model's maximum context length is 128 tokens. However, you requested 20 output tokens and your prompt has 120."


@pytest.fixture(autouse=True)
def quick_waits_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT_SECONDS", 0.02)
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def engine_of(server: FaultyServer, **changes: Any) -> Engine:
    options: dict[str, Any] = {"concurrency": 4, "timeout_seconds": 5.0, "max_retries": 2}
    return open_server(server.url, "a-model", **(options | changes))


def asks(number: int) -> list[Request]:
    return [Request(key=f"task/{index}", messages=(("user", f"question {index}"),)) for index in range(number)]


def repeats(exchange: Exchange) -> None:
    says(f"answer to {exchange.user()}")(exchange)


def by_user(*special: tuple[str, Behaviour], others: Behaviour = repeats) -> Behaviour:
    """A behaviour that depends on what is asked."""
    behaviours = dict(special)
    return lambda exchange: behaviours.get(exchange.user(), others)(exchange)


def failing_once(failure: Behaviour) -> Behaviour:
    """Every question meets the failure the first time it is asked."""
    seen: set[str] = set()
    lock = threading.Lock()

    def answer(exchange: Exchange) -> None:
        with lock:
            is_first = exchange.user() not in seen
            seen.add(exchange.user())
        (failure if is_first else repeats)(exchange)

    return answer


def collect(outputs: Iterator[Output]) -> tuple[list[Output], ServerError | None]:
    kept: list[Output] = []
    try:
        for output in outputs:
            kept.append(output)
    except ServerError as error:
        return kept, error
    return kept, None


def test_every_request_is_answered_once_with_what_the_server_wrote() -> None:
    with FaultyServer(repeats) as server:
        outputs = list(engine_of(server)(asks(20), GREEDY))
    assert sorted(output.key for output in outputs) == sorted(request.key for request in asks(20))
    for output in outputs:
        number = output.key.removeprefix("task/")
        assert output.text == f"answer to question {number}"
        assert (output.finish_reason, output.prompt_tokens, output.completion_tokens, output.reason) == ("stop", 7, 5, "")
        assert 0 < output.seconds < 5
    assert len(server.requests) == 20


def test_no_requests_need_no_server() -> None:
    assert list(open_server("http://127.0.0.1:9/v1", "a-model")([], GREEDY)) == []


def test_a_request_holds_the_sampling_and_a_seed_of_its_own() -> None:
    sampling = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=99, stop=("\n\n", "END"))
    with FaultyServer(repeats) as server:
        list(engine_of(server, concurrency=1)(asks(2), sampling))
        list(engine_of(server, concurrency=1)(asks(1), GREEDY))
    first, second, greedy = server.requests
    assert first == {
        "model": "a-model",
        "messages": [{"role": "user", "content": "question 0"}],
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_tokens": 99,
        "stop": ["\n\n", "END"],
        "seed": seed_of(asks(1)[0]),
    }
    assert first["seed"] != second["seed"]
    assert set(greedy) == {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
    assert (greedy["temperature"], greedy["top_p"]) == (0.0, 1.0)


def test_seeds_depend_on_seed_and_key_alone_and_never_changed() -> None:
    assert seed_of(Request(key="aime24/0/0", prompt="a")) == seed_of(Request(key="aime24/0/0", prompt="b")) == 75_504_377
    seeds = {seed_of(Request(key=f"aime24/{key}", seed=seed)) for key in range(200) for seed in range(5)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_plain_prompt_is_continued_as_it_is() -> None:
    body = {"choices": [{"text": " Paris", "finish_reason": "length"}], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}
    with FaultyServer(sends(json.dumps(body).encode())) as server:
        (output,) = engine_of(server)([Request(key="a", prompt="The capital of France is")], GREEDY)
    assert (output.text, output.finish_reason) == (" Paris", "length")
    assert server.paths == ["/v1/completions"]
    assert server.requests[0]["prompt"] == "The capital of France is"
    assert "messages" not in server.requests[0]


def test_outputs_come_in_the_order_in_which_they_are_finished() -> None:
    def slow_first(exchange: Exchange) -> None:
        time.sleep(0.6 if exchange.user() == "question 0" else 0.0)
        repeats(exchange)

    with FaultyServer(slow_first) as server:
        outputs = list(engine_of(server, concurrency=2)(asks(5), GREEDY))
    assert [output.key for output in outputs] == ["task/1", "task/2", "task/3", "task/4", "task/0"]
    assert outputs[-1].seconds > 0.5 > outputs[0].seconds


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_as_many_requests_are_in_flight_as_was_asked_for_and_no_more(concurrency: int) -> None:
    lock = threading.Lock()
    flying = most = 0

    def counting(exchange: Exchange) -> None:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.05)
        with lock:
            flying -= 1
        repeats(exchange)

    with FaultyServer(counting) as server:
        assert len(list(engine_of(server, concurrency=concurrency)(asks(24), GREEDY))) == 24
    assert most == concurrency


@pytest.mark.parametrize("failure", [refuses(500), refuses(503), hangs_up, sends(b"<html>"), says(None), says("", "abort")])
def test_a_failure_that_passes_costs_no_output(failure: Behaviour) -> None:
    with FaultyServer(failing_once(failure)) as server:
        outputs = list(engine_of(server)(asks(12), GREEDY))
    assert sorted(output.text for output in outputs) == sorted(f"answer to question {number}" for number in range(12))
    assert len(server.requests) == 24


def test_a_request_that_fails_each_time_ends_the_run_after_what_was_finished() -> None:
    with FaultyServer(by_user(("question 5", refuses(500)))) as server:
        outputs, error = collect(engine_of(server, concurrency=2)(asks(300), GREEDY))
    assert error is not None
    assert str(error).startswith("task/5: http://127.0.0.1:")
    assert "status 500" in str(error)
    assert "asked 3 times" in str(error)
    keys = [output.key for output in outputs]
    assert set(keys) >= {f"task/{number}" for number in range(5)}
    assert len(keys) == len(set(keys)) == len(server.requests) - 3
    assert "task/299" not in keys


def test_what_is_being_answered_when_the_run_ends_is_waited_for() -> None:
    started = threading.Event()

    def slow(exchange: Exchange) -> None:
        started.set()
        time.sleep(0.5)
        repeats(exchange)

    def broken(exchange: Exchange) -> None:
        started.wait(5)
        refuses(404)(exchange)

    with FaultyServer(by_user(("question 0", slow), ("question 1", broken))) as server:
        outputs, error = collect(engine_of(server, concurrency=2)(asks(9), GREEDY))
    assert [output.key for output in outputs] == ["task/0"]
    assert "status 404" in str(error)
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run_at_once(status: int) -> None:
    with FaultyServer(refuses(status)) as server:
        outputs, error = collect(engine_of(server)(asks(50), GREEDY))
    assert not outputs
    assert f"status {status}" in str(error)
    assert len(server.requests) <= 4


def test_a_server_that_is_not_there_ends_the_run() -> None:
    with FaultyServer(repeats) as server:
        engine = engine_of(server)
    outputs, error = collect(engine(asks(50), GREEDY))
    assert not outputs
    assert "Connection refused" in str(error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_loses_no_sample_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("structcot.eval.remote._output", fails)
    with FaultyServer(repeats) as server:
        outputs, error = collect(engine_of(server, concurrency=2)(asks(5), GREEDY))
    assert not outputs
    assert "5 requests were given up" in str(error)


def test_a_limit_of_the_rate_pauses_every_request() -> None:
    times: list[float] = []
    limited = threading.Event()

    def limits_once(exchange: Exchange) -> None:
        times.append(time.monotonic())
        if exchange.user() == "question 3" and not limited.is_set():
            limited.set()
            refuses(429, Retry_After="1")(exchange)
        else:
            time.sleep(0.05)
            repeats(exchange)

    with FaultyServer(limits_once) as server:
        outputs = list(engine_of(server)(asks(40), GREEDY))
    assert len({output.key for output in outputs}) == len(outputs) == 40
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) >= 0.9  # in which nobody asked
    assert max(output.seconds for output in outputs) < 0.9


def test_a_limit_that_lets_a_few_pass_at_a_time_is_kept_for_as_long_as_it_takes() -> None:
    lock, window = threading.Lock(), {"start": 0.0, "used": 0}

    def two_in_a_window(exchange: Exchange) -> None:
        with lock:
            if time.monotonic() - window["start"] > 0.1:
                window.update(start=time.monotonic(), used=0)
            window["used"] += 1
            is_free = window["used"] <= 2
        (repeats if is_free else refuses(429, Retry_After="0.11"))(exchange)

    with FaultyServer(two_in_a_window) as server:
        outputs = list(engine_of(server, concurrency=8, max_retries=2)(asks(24), GREEDY))
    assert len({output.key for output in outputs}) == len(outputs) == 24


def test_a_limit_that_lets_nothing_pass_ends_the_run() -> None:
    with FaultyServer(refuses(429, "You exceeded your current quota")) as server:
        outputs, error = collect(engine_of(server)(asks(20), GREEDY))
    assert not outputs
    assert "exceeded your current quota" in str(error)
    assert len(server.requests) <= 12


def test_a_server_that_asks_to_wait_for_hours_ends_the_run() -> None:
    with FaultyServer(refuses(429, Retry_After="7200")) as server:
        _, error = collect(engine_of(server)(asks(20), GREEDY))
    assert "asks to wait 7200 seconds" in str(error)


@pytest.mark.parametrize(
    "refusal",
    [
        refuses(400, TOO_LONG),
        refuses(422, "Input is too long"),
        refuses(400, "The response was filtered due to the content management policy"),
        refuses(413, ""),
        refuses(400, "I do not like it"),
    ],
)
def test_a_request_refused_for_its_content_is_an_output_and_the_others_go_on(refusal: Behaviour) -> None:
    with FaultyServer(by_user(("question 1", refusal))) as server:
        outputs = {output.key: output for output in engine_of(server)(asks(12), GREEDY)}
    assert len(outputs) == 12
    refused = outputs.pop("task/1")
    assert (refused.finish_reason, refused.text, refused.completion_tokens) == ("refused", "", 0)
    assert "status 4" in refused.reason
    assert {output.finish_reason for output in outputs.values()} == {"stop"}


def test_a_doubtful_refusal_waits_until_another_request_is_answered() -> None:
    def slow(exchange: Exchange) -> None:
        time.sleep(0.3)
        repeats(exchange)

    with FaultyServer(by_user(("question 0", refuses(400, "no")), ("question 1", refuses(400, "no")), others=slow)) as server:
        outputs = [(output.key, output.finish_reason) for output in engine_of(server)(asks(4), GREEDY)]
    assert sorted(outputs) == [("task/0", "refused"), ("task/1", "refused"), ("task/2", "stop"), ("task/3", "stop")]


class SlowToStart(threading.Thread):
    """A thread that has had time to do its first work before the next one is started."""

    def start(self) -> None:
        super().start()
        time.sleep(0.3)


def test_a_doubtful_refusal_waits_for_threads_that_have_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structcot.eval.remote.threading.Thread", SlowToStart)
    with FaultyServer(by_user(("question 0", refuses(400, "no")))) as server:
        outputs = {output.key: output.finish_reason for output in engine_of(server, concurrency=2)(asks(3), GREEDY)}
    assert outputs == {"task/0": "refused", "task/1": "stop", "task/2": "stop"}


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_refusal_that_meets_every_request_ends_the_run(concurrency: int) -> None:
    with FaultyServer(refuses(400, "unknown field: top_k")) as server:
        outputs, error = collect(engine_of(server, concurrency=concurrency)(asks(50), GREEDY))
    assert not outputs
    assert "unknown field: top_k; asked 1 time; mend the url" in str(error)
    assert len(server.requests) == concurrency


def room_for(context: int) -> Behaviour:
    """Refuses as vLLM does where prompt and max_tokens exceed the context, and writes to the end of it where max_tokens is not given."""

    def answer(exchange: Exchange) -> None:
        prompt = len(exchange.user())
        wanted = exchange.body.get("max_tokens")
        if prompt >= context or (wanted is not None and prompt + wanted > context):
            refuses(400, TOO_LONG)(exchange)
        else:
            says("cut", "length" if wanted is None else "stop")(exchange)

    return answer


def test_an_output_may_be_as_long_as_the_prompt_leaves_room_for() -> None:
    requests = [Request(key=str(length), messages=(("user", "x" * length),)) for length in (10, 90, 99, 100, 150)]
    with FaultyServer(room_for(100)) as server:
        outputs = {output.key: output.finish_reason for output in engine_of(server)(requests, Sampling(max_new_tokens=50))}
    assert outputs == {"10": "stop", "90": "length", "99": "length", "100": "refused", "150": "refused"}


def test_a_server_that_knows_no_seed_is_asked_without_one() -> None:
    def knows_no_seed(exchange: Exchange) -> None:
        (refuses(422, "extra field: seed") if "seed" in exchange.body else repeats)(exchange)

    with FaultyServer(knows_no_seed) as server:
        outputs = list(engine_of(server)(asks(3), GREEDY))
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert all("max_tokens" in request for request in server.requests)


@pytest.mark.parametrize(
    ("said", "finish_reason"),
    [("stop", "stop"), ("length", "length"), ("eos", "stop"), ("tool_calls", "stop"), (None, "stop"), ("content_filter", "refused")],
)
def test_the_finish_reason_is_one_of_three(said: str | None, finish_reason: str) -> None:
    with FaultyServer(says("text", said)) as server:
        (output,) = engine_of(server)(asks(1), GREEDY)
    assert output.finish_reason == finish_reason
    assert bool(output.reason) == (finish_reason == "refused")


def test_a_server_that_does_not_say_why_it_stopped_has_stopped_at_the_limit_where_it_wrote_as_much() -> None:
    with FaultyServer(says("text", None)) as server:
        (output,) = engine_of(server)(asks(1), Sampling(max_new_tokens=5))
    assert output.finish_reason == "length"


def test_a_server_that_counts_no_tokens_is_told_apart_from_one_that_wrote_none() -> None:
    with FaultyServer(says("text", "stop", usage=None), says("", "stop")) as server:
        uncounted, empty = engine_of(server, concurrency=1)(asks(2), GREEDY)
    assert (uncounted.prompt_tokens, uncounted.completion_tokens, uncounted.reason) == (0, 0, COUNTS_NOTHING)
    assert (empty.text, empty.reason) == ("", "")


@pytest.mark.parametrize(
    ("message", "finish_reason", "text"),
    [
        ({"content": "It is 4.", "reasoning_content": "2 + 2"}, "stop", "<think>\n2 + 2\n</think>\n\nIt is 4."),
        ({"content": "It is 4.", "reasoning": "2 + 2"}, "stop", "<think>\n2 + 2\n</think>\n\nIt is 4."),
        ({"content": None, "reasoning_content": "2 + "}, "length", "<think>\n2 + "),
        ({"content": "It is 4.", "reasoning_content": None}, "stop", "It is 4."),
    ],
)
def test_a_thought_that_the_server_took_out_stands_in_front_again(message: dict[str, Any], finish_reason: str, text: str) -> None:
    body = completion("", finish_reason)
    body["choices"][0]["message"] = {"role": "assistant", **message}
    with FaultyServer(sends(json.dumps(body).encode())) as server:
        (output,) = engine_of(server)(asks(1), GREEDY)
    assert (output.text, output.finish_reason) == (text, finish_reason)


@settings(max_examples=20)
@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_a_text_never_holds_a_stop_string_and_is_the_longest_such_beginning(text: str, stop: list[str]) -> None:
    with FaultyServer(says(text, "length")) as server:
        (output,) = engine_of(server)(asks(1), Sampling(stop=tuple(stop)))
    assert text.startswith(output.text)
    assert not any(string in output.text for string in stop)
    is_cut = len(output.text) < len(text)
    assert is_cut == any(string in text for string in stop)
    assert output.finish_reason == ("stop" if is_cut else "length")
    if is_cut:
        assert any(text.startswith(output.text + string) for string in stop)


def repeats_the_key(status: int) -> Behaviour:
    def answer(exchange: Exchange) -> None:
        words = f"{TOO_LONG} the header was {exchange.headers['Authorization']}"
        exchange.send(status, json.dumps({"error": {"message": words}}).encode())

    return answer


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_the_key_is_sent_and_stands_in_no_output_and_no_log(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with FaultyServer(repeats_the_key(status)) as server:
        outputs, error = collect(engine_of(server, key_variable="MY_KEY", max_retries=1)(asks(2), GREEDY))
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert (status == 400) == bool(outputs)
    assert (status == 400) == (error is None)
    assert "***" in repr((outputs, error))
    for text in [repr(outputs), repr(error), caplog.text, *capfd.readouterr()]:
        assert KEY[:8] not in text


def test_a_key_that_no_header_can_carry_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
    with FaultyServer(repeats) as server, pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        list(engine_of(server)(asks(3), GREEDY))
    assert not server.requests


def test_outputs_that_nobody_wants_any_more_are_not_asked_for() -> None:
    with FaultyServer(late(0.05)) as server:
        outputs = engine_of(server, concurrency=2)(asks(100), GREEDY)
        next(outputs)
        outputs.close()  # pyright: ignore[reportAttributeAccessIssue]
        time.sleep(0.3)
        assert len(server.requests) <= 6


INTERRUPTED = """
import sys
from structcot.eval.engine import Request, Sampling
from structcot.eval.remote import open_server
requests = [Request(key=str(number), messages=(("user", str(number)),)) for number in range(50)]
try:
    for output in open_server(sys.argv[1], "a-model", concurrency=4)(requests, Sampling()):
        print(output.key, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_leaves_at_once_though_answers_are_awaited() -> None:
    def first_only(exchange: Exchange) -> None:
        if exchange.user() != "0":
            time.sleep(60)
        repeats(exchange)

    with FaultyServer(first_only) as server:
        command = [sys.executable, "-c", INTERRUPTED, server.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    assert rest == "interrupted\n"
    assert process.returncode == 0
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"concurrency": 0}, "concurrency: got 0"), ({"timeout_seconds": 0.0}, "timeout_seconds"), ({"max_retries": -1}, "max_retries")],
)
def test_a_value_that_cannot_be_used_is_refused_when_the_engine_is_opened(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_server("http://localhost:8000/v1", "a-model", **changes)


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["ok", "500", "429", "hang up", "refused"]), min_size=1, max_size=40), st.integers(1, 8))
def test_whatever_passing_failures_come_no_sample_is_lost_or_repeated(script: list[str], concurrency: int) -> None:
    lock = threading.Lock()
    todo, meets = list(script), Counter[str]()

    def trouble(exchange: Exchange) -> None:
        with lock:
            meets[exchange.user()] += 1
            what = todo.pop() if todo and meets[exchange.user()] <= 2 else "ok"
        behaviours = {"ok": repeats, "500": refuses(500), "429": refuses(429, Retry_After="0.01"), "hang up": hangs_up}
        behaviours.get(what, refuses(400, TOO_LONG))(exchange)

    with pytest.MonkeyPatch.context() as patch, FaultyServer(trouble) as server:
        patch.setattr(server_module, "FIRST_WAIT_SECONDS", 0.001)
        outputs = list(engine_of(server, concurrency=concurrency, max_retries=4)(asks(12), GREEDY))
    assert sorted(output.key for output in outputs) == sorted(request.key for request in asks(12))
    assert all(output.text == f"answer to question {output.key[5:]}" for output in outputs if output.finish_reason == "stop")
