"""A model behind a real server: the same answers as in this process, and none lost or repeated where the server is killed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from structcot.errors import ServerError
from structcot.eval.embedded import open_embedded
from structcot.eval.engine import Output, Request, Sampling
from structcot.eval.remote import open_server
from tests.chat_tokenizers import tiny_tokenizer
from tests.real_server import RealServer, real_server
from tests.tiny_models import tiny_checkpoint
from tests.tiny_run import Site, finish, read_jsonl, write_jsonl

pytestmark = pytest.mark.slow

SAMPLING = Sampling(max_new_tokens=24)
REQUESTS = [
    *(Request(key=f"chat/{number}", messages=(("system", "Be brief."), ("user", f"What is {number}?"))) for number in range(12)),
    *(Request(key=f"plain/{number}", prompt=f"{number} and {number} is") for number in range(12)),
]


def tiny_llama(directory: Path) -> Path:
    """A model of a kind whose answers the server gives as they are; from those of Qwen2 it takes tool calls and white space."""
    tokenizer = tiny_tokenizer()
    ids: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_checkpoint(directory, "llama3-rope-tied", vocab_size=384, **ids)
    tokenizer.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    directory = tmp_path_factory.mktemp("served")
    with real_server(tiny_llama(directory / "model"), directory / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def expected(server: RealServer) -> dict[str, str]:
    """What the embedded engine writes."""
    engine = open_embedded(server.model, revision="main", adapter="", dtype="float32", batch_size=8)
    return texts_of(list(engine(REQUESTS, SAMPLING)))


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def texts_of(outputs: list[Output]) -> dict[str, str]:
    texts = {output.key: f"{output.prompt_tokens} {output.completion_tokens} {output.finish_reason} {output.text}" for output in outputs}
    assert len(texts) == len(outputs), "an output came twice"
    return texts


def test_a_server_gives_the_answers_of_the_embedded_engine(server: RealServer, expected: dict[str, str]) -> None:
    outputs = list(open_server(server.url, server.model, concurrency=3)(REQUESTS, SAMPLING))
    assert texts_of(outputs) == expected
    assert len(set(expected.values())) > len(REQUESTS) / 2


def test_a_stop_string_ends_the_text_before_it(server: RealServer, expected: dict[str, str]) -> None:
    text = expected["plain/3"].split(" ", 3)[3]
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    (output,) = open_server(server.url, server.model)([REQUESTS[15]], Sampling(max_new_tokens=24, stop=(stop,)))
    assert (output.text, output.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_model_that_the_server_does_not_have_ends_the_run(server: RealServer) -> None:
    with pytest.raises(ServerError, match="pinned"):
        list(open_server(server.url, "another-model")(REQUESTS, SAMPLING))


def test_a_run_whose_server_is_killed_keeps_what_was_finished_and_goes_on_with_the_rest(
    server: RealServer, expected: dict[str, str]
) -> None:
    kept: list[Output] = []

    def keep_eight_and_kill() -> None:
        for output in open_server(server.url, server.model, concurrency=3, max_retries=1)(REQUESTS, SAMPLING):
            kept.append(output)
            if len(kept) == 8:
                server.kill()

    with pytest.raises(ServerError, match=r"no answer|cut short"):
        keep_eight_and_kill()
    assert 8 <= len(kept) < len(REQUESTS)
    server.start()
    done = {output.key for output in kept}
    rest = [request for request in REQUESTS if request.key not in done]
    kept += open_server(server.url, server.model, concurrency=3)(rest, SAMPLING)
    assert texts_of(kept) == expected


def test_a_run_outlives_a_server_that_is_killed_and_comes_back(server: RealServer, expected: dict[str, str]) -> None:
    kept: list[Output] = []
    comes_back = threading.Thread(target=server.start)
    for output in open_server(server.url, server.model, concurrency=3, max_retries=8)(REQUESTS, SAMPLING):
        kept.append(output)
        if len(kept) == 8:
            server.kill()
            comes_back.start()
    comes_back.join()
    assert texts_of(kept) == expected


def test_an_evaluation_over_http_goes_on_where_the_server_was_killed(server: RealServer, tmp_path: Path) -> None:
    site, out = Site(tmp_path), tmp_path / "out"
    problems = [{"problem": f"What is {number}?", "answer": str(number)} for number in range(16)]
    tasks = str(write_jsonl(tmp_path / "numbers.jsonl", problems))
    settings = (f"server.url={server.url}", f"server.model={server.model}", "server.concurrency=2", "server.max_retries=1")
    arguments = ("eval", *settings, "sampling.max_new_tokens=24", "--tasks", tasks, "--engine", "openai", "--output-dir", str(out))
    process = site.start(*arguments)
    deadline = time.monotonic() + 200
    while not (out / "samples.jsonl").exists() or len((out / "samples.jsonl").read_bytes().splitlines()) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.kill()
    stopped = finish(process)
    assert (stopped.status, "Traceback" in stopped.err) == (1, False)
    kept = (out / "samples.jsonl").read_bytes().splitlines()
    assert 5 <= len(kept) < 16
    assert f"{len(kept)} of 16 outputs are kept, the same command goes on" in stopped.err
    server.start()
    outcome = finish(site.start(*arguments))
    assert outcome.status == 0, outcome.err
    lines = read_jsonl(out / "samples.jsonl")
    assert [line["problem_id"] for line in lines] == [str(number) for number in range(16)]
    outputs = {line["problem_id"]: line["output"] for line in lines}
    assert all(outputs[sample["problem_id"]] == sample["output"] for sample in map(json.loads, kept))
    assert all(line["verdict"] and line["completion_tokens"] for line in lines)
