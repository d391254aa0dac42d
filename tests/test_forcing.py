"""Answers forced out of thoughts that did not end: which outputs are forced, what is judged, and that the plain score stays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from structcot.errors import ConfigError
from structcot.eval.command import read_config
from structcot.eval.engine import Output, Request, Sampling
from structcot.eval.forcing import forced_prefix
from structcot.eval.run import evaluate
from tests.tiny_models import tiny_chat_model

OPEN = "<|begin_of_thought|>\n\nTry 2 + 2"
CLOSED = f"{OPEN}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>"
ASKED = {"right": "4", "ends": "5", "looping": "6"}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Request]:
    """Three problems in a file, a model that never ends its thought on two of them, and all requests that it is given."""
    lines = [json.dumps({"id": name, "question": name, "answer": gold}) for name, gold in ASKED.items()]
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    requests: list[Request] = []

    def answer(given: Sequence[Request], sampling: Sampling) -> Iterator[Output]:
        for request in given:
            requests.append(request)
            name = request.key.split("/")[1]
            text, reason = (f"{CLOSED}\\boxed{{5}}", "stop") if name == "ends" else (OPEN, "length")
            if request.prefill:
                text, reason = ("\\boxed{4}", "stop")
            yield Output(key=request.key, text=text, finish_reason=reason, prompt_tokens=3, completion_tokens=5, seconds=0.1)

    monkeypatch.setattr("structcot.eval.run.open_engine", lambda subject, config: answer)
    monkeypatch.chdir(tmp_path)
    return requests


def config_of(tmp_path: Path, model: Path, *overrides: str):
    options = {"model_name_or_path": str(model), "tasks": "own=own.jsonl", "output_dir": str(tmp_path / "eval")}
    return read_config(overrides, options)


@pytest.mark.parametrize(
    ("output", "prefix"),
    [
        (OPEN, f"{CLOSED}\n\n"),
        ("<think>\nHmm \n", "<think>\nHmm\n\n</think>\n\n"),
        (CLOSED, ""),
        ("no thought at all", ""),
        ("<think>a</think> 4", ""),
        (f"{OPEN} <|begin_of_solution|> 4", ""),
    ],
)
def test_only_an_open_thought_is_ended(output: str, prefix: str) -> None:
    assert forced_prefix(output) == prefix


def test_forced_answers_are_scored_beside_the_plain_ones(tmp_path: Path, chat_model: Path, asked: list[Request]) -> None:
    results = evaluate(config_of(tmp_path, chat_model, "sampling.forced_answer_tokens=8"))
    task = results["tasks"]["own"]
    assert task["accuracy"] == pytest.approx(1 / 3)  # only the one that ended
    assert task["forced"]["accuracy"] == pytest.approx(2 / 3)  # "looping" is forced to say 4, which is wrong
    assert [request.prefill for request in asked if request.prefill] == [f"{CLOSED}\n\n"] * 2
    lines = {line["problem_id"]: line for line in map(json.loads, (tmp_path / "eval" / "samples.jsonl").open(encoding="utf-8"))}
    assert lines["right"]["output"] == OPEN
    assert not lines["right"]["correct"]
    assert lines["right"]["forced_correct"]
    assert lines["ends"]["forced_output"] is None
    assert lines["ends"]["forced_correct"]


def test_a_second_call_forces_nothing_again(tmp_path: Path, chat_model: Path, asked: list[Request]) -> None:
    config = config_of(tmp_path, chat_model, "sampling.forced_answer_tokens=8")
    first = evaluate(config)
    num_asked = len(asked)
    assert evaluate(config) == first
    assert len(asked) == num_asked == 5


def test_without_forcing_nothing_is_said_of_it(tmp_path: Path, chat_model: Path, asked: list[Request]) -> None:
    assert evaluate(config_of(tmp_path, chat_model))["tasks"]["own"]["forced"] is None
    assert not any(request.prefill for request in asked)


def test_a_server_is_not_asked_to_go_on_from_a_thought(tmp_path: Path, chat_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.forced_answer_tokens: a server"):
        config_of(tmp_path, chat_model, "sampling.forced_answer_tokens=8", "engine=openai", "server.url=http://x/v1", "server.model=m")


def test_a_task_may_have_a_grader_of_its_own(tmp_path: Path, chat_model: Path, asked: list[Request]) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "ends", "question": "ends", "answer": "4 + 1"}), encoding="utf-8")
    tasks = '[{name = "own", path = "own.jsonl"%s}]'
    plain = evaluate(config_of(tmp_path, chat_model, "tasks=" + tasks % ""))
    exact = evaluate(config_of(tmp_path, chat_model, "tasks=" + tasks % ', grader = "exact"'))
    assert plain["tasks"]["own"]["accuracy"] == 1.0
    assert exact["tasks"]["own"]["accuracy"] == 0.0
