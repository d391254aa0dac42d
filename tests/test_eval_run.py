"""A whole evaluation: what it writes, how it goes on after whatever stopped it, and what it refuses to mix."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from structcot.errors import ConfigError, MismatchError, ServerError
from structcot.eval.command import read_config
from structcot.eval.run import evaluate
from tests.faulty_server import Behaviour, Exchange, FaultyServer, refuses, says
from tests.tiny_run import Site, finish, make_site, read_jsonl, write_jsonl

KEY = "sk-nobody-may-see-this"
PROBLEMS = [{"problem": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(12)]


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "sums.jsonl", PROBLEMS))


def adds(exchange: Exchange) -> None:
    """Answer a sum rightly where its number is even."""
    number = int(exchange.user().split(" is ")[1].split(" ")[0])
    says(f"<think>Hmm.</think> It is \\boxed{{{number + 1 + number % 2}}}.")(exchange)


def slowly(behaviour: Behaviour, seconds: float) -> Behaviour:
    def wait(exchange: Exchange) -> None:
        time.sleep(seconds)
        behaviour(exchange)

    return wait


def run(tasks: str, server: FaultyServer, output_dir: Path, *overrides: str, limit: int | None = None) -> dict[str, Any]:
    settings = (f"server.url={server.url}", "server.model=m", "server.concurrency=4", *overrides)
    return evaluate(read_config(settings, {"tasks": tasks, "engine": "openai", "output_dir": str(output_dir), "limit": limit}))


def asked(server: FaultyServer) -> Counter[str]:
    return Counter(body["messages"][-1]["content"] for body in server.requests)


def test_an_evaluation_from_problems_to_reports(tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultyServer(adds) as server:
        results = run(tasks, server, tmp_path / "out", "sampling.num_samples=2", "sampling.temperature=0.6")
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert len({body["seed"] for body in server.requests}) == 24
    assert results["tasks"]["sums"]["accuracy"] == 0.5
    lines = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert [(line["problem_id"], line["sample"]) for line in lines] == [(str(number), sample) for number in range(12) for sample in (0, 1)]
    first = lines[0]
    assert (first["extracted"], first["verdict"], first["correct"], first["paper_correct"], first["ending"]) == (
        "1",
        "correct",
        True,
        True,
        "finished",
    )
    assert first["prompt"] == [{"role": "user", "content": "Return your final response within \\boxed{}. What is 0 + 1?"}]
    assert {line["verdict"] for line in lines[2:4]} == {"wrong"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["sums"]["problems"] == 12
    for name in ("report.md", "report.html", "eval.toml", "manifest.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_a_written_config_repeats_the_evaluation_without_a_request(tasks: str, tmp_path: Path) -> None:
    with FaultyServer(adds) as server:
        first = run(tasks, server, tmp_path / "out")
        samples = (tmp_path / "out" / "samples.jsonl").read_bytes()
        again = evaluate(read_config((str(tmp_path / "out" / "eval.toml"), f"output_dir={tmp_path / 'out'}"), {}))
        assert len(server.requests) == 12
    assert again == first
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == samples


def test_more_problems_and_samples_are_added_to_what_is_there(tasks: str, tmp_path: Path) -> None:
    with FaultyServer(adds) as server:
        run(tasks, server, tmp_path / "out", limit=3)
        run(tasks, server, tmp_path / "out", limit=5)
        results = run(tasks, server, tmp_path / "out", "sampling.num_samples=2", limit=5)
        assert sorted(asked(server).values()) == [2] * 5
    assert results["tasks"]["sums"]["samples"] == 10


@pytest.mark.parametrize(
    ("overrides", "limit", "message"),
    [
        (("seed=1",), 3, r"holds an evaluation with seed 0, not 1"),
        (("sampling.temperature=1.0",), 3, r"holds an evaluation with sampling .*temperature"),
        (("system_prompt='Think.'",), 3, r"holds an evaluation with system_prompt \"\", not \"Think.\""),
        ((), 2, r"holds sample sums/2/0, which is not asked for"),
    ],
)
def test_samples_of_two_evaluations_are_never_mixed(
    tasks: str, tmp_path: Path, overrides: tuple[str, ...], limit: int, message: str
) -> None:
    with FaultyServer(adds) as server:
        run(tasks, server, tmp_path / "out", limit=3)
        before = (tmp_path / "out" / "samples.jsonl").read_bytes()
        with pytest.raises(MismatchError, match=message):
            run(tasks, server, tmp_path / "out", *overrides, limit=limit)
        assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before


def test_a_changed_problem_is_another_evaluation(tasks: str, tmp_path: Path) -> None:
    with FaultyServer(adds) as server:
        run(tasks, server, tmp_path / "out")
        write_jsonl(Path(tasks), [{"problem": "What is 5 + 5?", "answer": "10"}, *PROBLEMS[1:]])
        with pytest.raises(MismatchError, match="holds sample sums/0/0 of another prompt"):
            run(tasks, server, tmp_path / "out")


def test_a_line_that_a_kill_has_cut_is_written_again(tasks: str, tmp_path: Path) -> None:
    with FaultyServer(adds) as server:
        run(tasks, server, tmp_path / "out")
        path = tmp_path / "out" / "samples.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        run(tasks, server, tmp_path / "out")
        assert sum(asked(server).values()) == 13
        kept = [line | {"seconds": 0.0} for line in read_jsonl(path)]
        assert kept == [json.loads(line) | {"seconds": 0.0} for line in whole.splitlines()]


def test_a_file_that_no_evaluation_has_written_is_left_alone(tasks: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "out.jsonl", [])
    (tmp_path / "out").mkdir()
    write_jsonl(tmp_path / "out" / "samples.jsonl", [{"mine": 1}])
    with FaultyServer(adds) as server, pytest.raises(MismatchError, match=r"samples.jsonl:1: is no sample of an evaluation"):
        run(tasks, server, tmp_path / "out")


def test_what_was_finished_before_a_server_fails_is_kept(tasks: str, tmp_path: Path) -> None:
    with FaultyServer(*[adds] * 7, refuses(401)) as server:
        with pytest.raises(ServerError, match=r"7 of 12 outputs are kept, the same command goes on"):
            run(tasks, server, tmp_path / "out", "server.concurrency=1")
        server.script[-1] = adds
        assert run(tasks, server, tmp_path / "out")["tasks"]["sums"]["accuracy"] == 0.5
        assert sorted(asked(server).values()) == [1] * 11 + [2]


def test_a_refused_prompt_is_an_answer_that_is_missing(tasks: str, tmp_path: Path) -> None:
    with FaultyServer(adds, refuses(400, "it breaks the content policy"), adds) as server:
        results = run(tasks, server, tmp_path / "out", "server.concurrency=1")
    lines = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert (lines[1]["verdict"], lines[1]["ending"], lines[1]["correct"]) == ("no_answer", "refused", False)
    assert "content policy" in lines[1]["reason"]
    assert "refused" in " ".join(results["warnings"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_command_that_is_stopped_goes_on_and_asks_nothing_twice(tasks: str, tmp_path: Path, number: signal.Signals) -> None:
    site, out = Site(tmp_path), tmp_path / "out"
    with FaultyServer(slowly(adds, 0.3)) as server:
        arguments = ("eval", f"server.url={server.url}", "server.model=m", "server.concurrency=2", "--tasks", tasks, "--engine", "openai")
        process = site.start(*arguments, "--output-dir", str(out))
        wait_until(lambda: out.exists() and len(lines_of(out / "samples.jsonl")) >= 4)
        process.send_signal(number)
        outcome = finish(process)
        finished = {line["problem_id"] for line in lines_of(out / "samples.jsonl")}
        if number == signal.SIGKILL:
            assert outcome.status == -signal.SIGKILL
        else:
            assert (outcome.status, "Traceback" in outcome.err) == (75, False)
            assert f"stopped by {number.name}; {len(finished)} of 12 outputs are kept, the same command goes on" in outcome.err
        server.requests.clear()
        outcome = finish(site.start(*arguments, "--output-dir", str(out)))
        assert outcome.status == 0, outcome.err
        assert len(server.requests) == 12 - len(finished)
    lines = read_jsonl(out / "samples.jsonl")
    assert [line["problem_id"] for line in lines] == [str(number) for number in range(12)]
    assert [line["correct"] for line in lines] == [True, False] * 6


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines that are there by now."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.exists() else []


def wait_until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_evaluations_are_compared_on_the_same_problems(tasks: str, tmp_path: Path) -> None:
    with FaultyServer(adds) as server, FaultyServer(says("\\boxed{3}")) as other:
        run(tasks, server, tmp_path / "a")
        results = run(tasks, other, tmp_path / "b", f"compare_with=['{tmp_path / 'a'}']")
    (comparison,) = results["comparisons"]
    assert comparison["tasks"]["sums"]["difference"] == pytest.approx(1 / 12 - 0.5)
    with pytest.raises(ConfigError, match=r"compare_with: .*samples.jsonl is not there"), FaultyServer(adds) as server:
        run(tasks, server, tmp_path / "c", f"compare_with=['{tmp_path / 'nothing'}']")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


def test_the_embedded_engine_evaluates_a_model_on_disk(site: Site, tasks: str, tmp_path: Path) -> None:
    settings = ("sampling.max_new_tokens=6", "dtype=float32", "batch_size=4")
    options = {"model_name_or_path": str(site.model_dir), "tasks": tasks, "output_dir": str(tmp_path / "out")}
    results = evaluate(read_config(settings, options))
    assert results["tasks"]["sums"]["samples"] == 12
    lines = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert all(0 < line["completion_tokens"] <= 6 for line in lines)
    assert {line["ending"] for line in lines} <= {"finished", "truncated", "looping"}


def test_a_user_s_mistake_ends_in_one_message(site: Site, tasks: str, tmp_path: Path) -> None:
    for arguments, message in (
        (("eval", "--tasks", "aime24"), "model_name_or_path: is missing"),
        (("eval", "--tasks", "nothing", "--model", str(site.model_dir)), '"nothing" is no benchmark'),
        (("eval", "--tasks", tasks, "--model", str(tmp_path / "nowhere")), "nowhere"),
        (("eval", "--tasks", tasks, "--adapter", str(tmp_path)), "holds no adapter_config.json"),
        (("eval", "--tasks", str(tmp_path / "none.jsonl"), "--model", str(site.model_dir)), "does not exist"),
    ):
        outcome = site.run(*arguments)
        assert outcome.status == 2, outcome.err
        assert message in outcome.err
        assert "Traceback" not in outcome.err


def test_one_process_at_a_time_writes(tasks: str, tmp_path: Path) -> None:
    started = threading.Event()

    def tells(exchange: Exchange) -> None:
        started.set()
        time.sleep(0.5)
        adds(exchange)

    with FaultyServer(tells) as server:
        process = Site(tmp_path).start(
            *("eval", f"server.url={server.url}", "server.model=m", "--tasks", tasks, "--engine", "openai"),
            *("--output-dir", str(tmp_path / "out")),
        )
        assert started.wait(120)
        with pytest.raises(ConfigError, match="is in use by another run"):
            run(tasks, server, tmp_path / "out")
        assert finish(process).status == 0


HOSTILE = {
    "nothing": ("", "no_answer"),
    "no box": ("I do not know.", "no_answer"),
    "two boxes": ("\\boxed{4}, no: \\boxed{5}", "wrong"),
    "two boxes, the last right": ("\\boxed{5}, no: \\boxed{4}", "correct"),
    "a megabyte": ("Hmm, " * 200_000 + "\\boxed{4}", "correct"),
    "a megabyte in the box": ("\\boxed{" + "4+" * 500_000 + "4}", "wrong"),
    "a box that never closes": ("\\boxed{4", "no_answer"),
    "deep nesting": ("\\boxed{" + "\\frac{1}{" * 10_000 + "4" + "}" * 10_000 + "}", "wrong"),
    "a tower": ("\\boxed{9^{9^{9^{9^{9}}}}}", "wrong"),
    "a huge exponent": ("\\boxed{10^{10000000000}}", "wrong"),
    "a factorial of a factorial": ("\\boxed{100000!!}", "wrong"),
    "not a number": ("\\boxed{NaN}", "wrong"),
    "infinity": ("\\boxed{\\infty}", "wrong"),
    "null bytes": ("\\boxed{\0\0}", "wrong"),
    "half a surrogate": ("\\boxed{\ud800}", "wrong"),
    "an unfinished thought": ("<think> maybe \\boxed", "no_answer"),
}


def test_whatever_a_model_writes_gets_a_verdict_with_a_reason(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "hostile.jsonl", [{"id": name, "problem": f"{name}: 2 + 2?", "answer": "4"} for name in HOSTILE])
    answers = [says(text) for text, _ in HOSTILE.values()]
    with FaultyServer(*answers) as server:
        results = run(str(path), server, tmp_path / "out", "server.concurrency=1", "grading.limit_seconds=5.0", "grading.jobs=2")
    lines = {line["problem_id"]: line for line in read_jsonl(tmp_path / "out" / "samples.jsonl")}
    assert {name: line["verdict"] for name, line in lines.items()} == {name: verdict for name, (_, verdict) in HOSTILE.items()}
    assert all(line["reason"] and "\n" not in line["reason"] and len(line["reason"]) < 1000 for line in lines.values())
    assert results["tasks"]["hostile"]["verdicts"]["error"] == 0
    assert (tmp_path / "out" / "report.html").stat().st_size < 3_000_000
