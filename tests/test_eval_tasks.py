"""Benchmarks become problems: what every file says, in one shape, and a clear word where a row is none."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from structcot.errors import ConfigError, DataError, FetchError
from structcot.eval import tasks
from structcot.eval.config import TaskConfig
from structcot.eval.problem import Problem, ProgramTest
from structcot.eval.prompts import messages_of, prompt_styles
from structcot.eval.rows import BadRow, read_problem
from structcot.eval.tasks import TASKS, find_task, load_task

BENCHMARKS = Path(__file__).parent.parent.parent / "shared" / "data" / "benchmarks"


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "math500", "olympiadbench", "gsm8k"])
def test_the_released_files_are_recognised(name: str) -> None:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmark files are not at hand (../shared/data/benchmarks)")
    loaded = load_task(TASKS[name], str(BENCHMARKS))
    assert len(loaded.problems) == TASKS[name].num_problems
    assert loaded.is_released is True
    assert all(problem.gold and problem.question for problem in loaded.problems)


def test_one_changed_answer_is_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmark files are not at hand (../shared/data/benchmarks)")
    rows = [json.loads(line) for line in (BENCHMARKS / "aime24.jsonl").read_text(encoding="utf-8").splitlines()]
    write(tmp_path / "aime24.jsonl", *[row | {"answer": "1"} if number == 7 else row for number, row in enumerate(rows)])
    assert load_task(TASKS["aime24"], str(tmp_path)).is_released is False
    assert "other answers than the released version" in caplog.text


def test_a_benchmark_with_a_problem_too_few_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "aime24.jsonl", {"problem": "1 + 1?", "answer": 2})
    with pytest.raises(DataError, match=r"aime24: .* has 1 problems, the released version 30"):
        load_task(TASKS["aime24"], str(tmp_path))


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"question": "q", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,234"}, "1,234"),
        ({"problem": "q", "answer": 27.0}, "27"),
        ({"problem": "q", "answer": 0.5}, "0.5"),
        ({"problem": "q", "answer": 0}, "0"),
        ({"problem": "q", "solution": "so \\boxed{1}, no: \\boxed{\\frac{1}{2}}."}, "\\frac{1}{2}"),
        ({"problem": "q", "solution": "long", "answer": "\\boxed{70}"}, "70"),
        ({"question": "q", "final_answer": ["$3$,$4$"], "solution": ["long"]}, "$3$,$4$"),
        ({"question": "q", "final_answer": ["3", "4"]}, "3, 4"),
        ({"prompt": "q", "target": "yes"}, "yes"),
        ({"question": "q", "answer": "A", "gold": "B"}, "B"),
    ],
)
def test_the_answer_is_found_wherever_a_benchmark_keeps_it(row: dict[str, Any], gold: str) -> None:
    assert read_problem(row, 0).gold == gold


def test_the_facts_that_graders_need_come_along() -> None:
    row = {"id": 2592, "context": "Given.", "question": "q", "final_answer": ["4.2"], "error": "1e-1", "unit": "%", "subfield": "Algebra"}
    assert read_problem(row | {"is_multiple_answer": True}, 0) == Problem(
        id="2592", question="Given.\nq", gold="4.2", tolerance=0.1, unit="%", is_multiple=True, group="Algebra"
    )
    assert read_problem({"problem": "q", "answer": "1", "level": 5, "subject": "Algebra"}, 3).group == "level 5"
    assert read_problem({"problem": "q", "answer": "1"}, 3).id == "3"


def lcb_row(**changes: Any) -> dict[str, Any]:
    hidden = json.dumps([{"input": "3", "output": "4", "testtype": "functional"}])
    return {
        "question_id": "lc-1",
        "question_content": "Add one.",
        "starter_code": "class Solution:\n    def plusOne(self, n: int) -> int:\n        ",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1", "output": "2", "testtype": "functional"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode(),
        "metadata": json.dumps({"func_name": "plusOne"}),
    } | changes


def test_livecodebench_gives_public_and_hidden_tests() -> None:
    problem = read_problem(lcb_row(), 0)
    assert problem.tests == (ProgramTest(input="1", output="2"), ProgramTest(input="3", output="4"))
    assert (problem.entry_point, problem.group, problem.id) == ("plusOne", "easy", "lc-1")
    assert read_problem(lcb_row(metadata=""), 0).entry_point == "plusOne"
    assert read_problem(lcb_row(metadata="{}", starter_code=""), 0).entry_point == ""


class Payload:
    def __init__(self, directory: str):
        self.directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.directory,)


@pytest.mark.parametrize(
    ("input_output", "tests", "entry_point"),
    [
        ({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}, [("1 2\n", "3\n"), ("3\n4", "7")], ""),
        ({"fn_name": "add", "inputs": [[1, [2]], ["a"]], "outputs": [[3], "b"]}, [("1\n[2]", "[3]\n3"), ('"a"', '"b"')], "add"),
    ],
)
def test_apps_and_taco_keep_inputs_and_outputs_side_by_side(
    input_output: dict[str, Any], tests: list[tuple[str, str]], entry_point: str
) -> None:
    for value in (input_output, json.dumps(input_output)):
        problem = read_problem({"question": "Add.", "input_output": value}, 0)
        assert [(one.input, one.output) for one in problem.tests] == tests
        assert problem.entry_point == entry_point


@pytest.mark.parametrize("value", ["{", '{"inputs": [1], "outputs": []}', "[1]", '{"inputs": 1, "outputs": 1}'])
def test_tests_that_cannot_be_told_are_named(value: str) -> None:
    with pytest.raises(BadRow, match="has an input_output"):
        read_problem({"question": "Add.", "input_output": value}, 0)


def test_hidden_tests_that_would_run_code_are_refused(tmp_path: Path) -> None:
    packed = base64.b64encode(zlib.compress(pickle.dumps(Payload(str(tmp_path / "made"))))).decode()
    with pytest.raises(BadRow, match="which could run code"):
        read_problem(lcb_row(private_test_cases=packed), 0)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "is no JSON object"),
        ({"answer": "1"}, "has no question: found answer"),
        ({"problem": "q"}, "neither an answer nor tests"),
        ({"problem": "q", "answer": "  "}, "neither an answer nor tests"),
        ({"problem": "q", "answer": "1", "error": "about 1"}, "tolerance 'about 1'"),
        ({"problem": "q", "tests": [{"input": "1"}]}, "a test without input or output"),
        ({"problem": "q", "tests": {"input": "1"}}, "tests that are no list but dict"),
        ({"problem": "q", "tests": "%%%"}, "tests that cannot be decoded"),
    ],
)
def test_a_row_that_is_no_problem_says_why(row: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        read_problem(row, 0)


def test_every_bad_row_is_listed_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {"problem": "q", "answer": 1}, {"problem": "q"}, [])
    (tmp_path / "mine.jsonl").open("a").write("{\n")
    with pytest.raises(DataError) as caught:
        load_task(find_task(TaskConfig(name="mine", path=path)))
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"{path}:{number}" for number in (2, 3, 4)]


def test_two_problems_of_one_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {"id": 1, "problem": "q", "answer": 1}, {"id": "1", "problem": "r", "answer": 1})
    with pytest.raises(ConfigError, match=r'two problems of .* have the id "1"'):
        load_task(find_task(TaskConfig(name="mine", path=path)))


def test_a_benchmark_that_is_not_known_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'"aime2024" is no benchmark \(did you mean aime24\?\); use aime24, aime25'):
        find_task(TaskConfig(name="aime2024"))


def test_a_benchmark_may_come_from_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "other.jsonl", {"q": "1 + 1?", "a": "2"})
    task = find_task(TaskConfig(name="mine", path=path, question="q", answer="a"))
    assert load_task(task).problems == (Problem(id="0", question="1 + 1?", gold="2"),)
    assert find_task(TaskConfig(name="gsm8k", path=path)).files == ()


def test_without_the_hub_it_is_said_where_else_a_benchmark_may_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise FetchError("no network")

    monkeypatch.setattr(tasks, "find_snapshot", unreachable)
    with pytest.raises(FetchError, match=r"gsm8k: no network; or put gsm8k.jsonl into a directory and name that by data_dir=DIR"):
        load_task(TASKS["gsm8k"])


def test_parquet_is_read_with_all_its_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["1 + 1?"], "answer": ["2"]})
    pyarrow.parquet.write_table(table, tmp_path / "mine.parquet")
    assert load_task(find_task(TaskConfig(name="mine", path=str(tmp_path / "mine.parquet")))).problems[0].gold == "2"


def test_the_prompt_of_the_paper_is_the_one_its_harness_sends() -> None:
    style = prompt_styles()["sky-t1"]
    assert style.system.startswith(
        "Your role as an assistant involves thoroughly exploring questions through a systematic long thinking process"
    )
    assert style.system.endswith("Now, try to solve the following question through the above guidelines:")
    assert "thought with steps separated with '\n\n' <|end_of_thought|>" in style.system
    assert messages_of(Problem(id="0", question="What is $x$?", gold="1"), style) == (("system", style.system), ("user", "What is $x$?"))


def test_a_question_may_hold_braces() -> None:
    problem = Problem(id="0", question="Simplify \\frac{1}{2} {question}", gold="1")
    assert messages_of(problem, prompt_styles()["boxed"]) == (
        ("user", "Return your final response within \\boxed{}. Simplify \\frac{1}{2} {question}"),
    )
    assert messages_of(problem, prompt_styles()["boxed"], "Q: {question} A:")[0][1] == "Q: Simplify \\frac{1}{2} {question} A:"


def test_code_is_asked_for_by_its_kind() -> None:
    tests = (ProgramTest(input="1", output="2"),)
    stdin = messages_of(Problem(id="0", question="Add.", tests=tests), prompt_styles()["boxed"])[0][1]
    function = Problem(id="0", question="Add.", tests=tests, entry_point="add", starter_code="def add():")
    called = messages_of(function, prompt_styles()["boxed"])
    assert "take stdin as input" in stdin
    assert stdin.endswith("Add.")
    assert "without invoking it" in called[0][1]
    assert called[0][1].endswith("Add.\n\ndef add():")
