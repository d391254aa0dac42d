"""The command that grades records: what it reads, adds, leaves alone, counts and refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("math_verify", reason="math-verify is not installed: pip install structcot[eval]")

from structcot.errors import ConfigError
from structcot.grade import grade, summary_of
from structcot.grading.case import VERDICTS
from structcot.grading.graders import GRADERS
from tests.misbehaving_graders import obey

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
Record = dict[str, Any]


def graded(tmp_path: Path, lines: Sequence[Record | str], *settings: str, grader: str = "math") -> tuple[list[Any], Record]:
    source, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    facts = grade(str(source), str(to), grader, settings)
    return to.read_text(encoding="utf-8").splitlines(), facts


def one(tmp_path: Path, record: Record, grader: str = "math") -> Record:
    lines, _ = graded(tmp_path, [record], "jobs=1", grader=grader)
    return json.loads(lines[0])


def test_a_record_keeps_its_fields_and_order_and_gets_its_grade(tmp_path: Path) -> None:
    records = [{"id": number, "pred": str(number % 3), "gold": "1", "z": [1, {"y": None}], "a": "é"} for number in range(40)]
    lines, facts = graded(tmp_path, records, "jobs=2")
    for record, line in zip(records, map(json.loads, lines), strict=True):
        assert list(line)[: len(record)] == list(record)
        assert {name: line[name] for name in record} == record
        assert line["correct"] is (record["pred"] == "1")
        assert line["verdict"] == ("correct" if line["correct"] else "wrong")
        assert line["extracted"] == record["pred"]
        assert line["reason"]
    assert facts["graded"] == 40
    assert facts["verdicts"] == {"correct": 13, "wrong": 27, "no_answer": 0, "timeout": 0, "error": 0}
    assert facts["accuracy"] == 13 / 40


@pytest.mark.parametrize(
    "fields",
    [
        {"pred": "0.5"},
        {"pred": 0.5},
        {"response": "so \\boxed{1/2}"},
        {"completion": "<think>\\boxed{3}</think>\\boxed{1/2}"},
        {"output": "The answer is 1/2."},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\\boxed{1/2}"}]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "\\boxed{1/2}"}]},
        {"pred": None, "response": "\\boxed{1/2}"},
        {"pred": "1/2", "response": "\\boxed{3}"},
    ],
)
def test_the_answer_is_found_wherever_a_record_keeps_it(tmp_path: Path, fields: Record) -> None:
    assert one(tmp_path, {"gold": "\\frac{1}{2}", **fields})["verdict"] == "correct"


@pytest.mark.parametrize("fields", [{"pred": ""}, {"pred": None}, {"response": ""}, {"completion": ""}, {"response": "I do not know"}])
def test_no_answer_is_counted_as_such_and_is_not_right(tmp_path: Path, fields: Record) -> None:
    line = one(tmp_path, {"gold": "1", **fields})
    assert (line["correct"], line["verdict"], line["extracted"]) == (False, "no_answer", "")


def test_optional_fields_reach_the_grader(tmp_path: Path) -> None:
    assert one(tmp_path, {"gold": "2.25", "pred": "2.3", "tolerance": 0.05})["correct"]
    assert not one(tmp_path, {"gold": "2.25", "pred": "2.3", "tolerance": None})["correct"]
    assert one(tmp_path, {"gold": "3", "pred": "3V", "unit": "V"})["correct"]
    assert one(tmp_path, {"gold": "1,2", "pred": "(2,1)", "is_multiple": True})["correct"]
    assert not one(tmp_path, {"gold": "1,2", "pred": "(2,1)", "is_multiple": False})["correct"]


def test_a_line_that_cannot_be_graded_goes_through_byte_for_byte_with_its_reason_counted(tmp_path: Path) -> None:
    bad = [
        "not json",
        "",
        "[1, 2]",
        '{"a":  1}',
        '{"pred":  "1"}',
        '{"gold": "1",   "b": 2}',
        '{"gold": ["1"], "pred": "1"}',
        '{"gold": "1", "pred": "1", "tolerance": "x"}',
        '{"gold": true, "pred": "1"}',
        '{"gold": "1", "pred": "1", "is_multiple": 1}',
    ]
    good = {"gold": "1", "pred": "1"}
    lines, facts = graded(tmp_path, [*bad[:5], good, *bad[5:]], "jobs=1")
    assert lines[:5] + lines[6:] == bad
    assert json.loads(lines[5])["correct"]
    assert facts["graded"] == 1
    assert sum(facts["unusable"].values()) == len(bad)
    assert any('"tolerance" is a str; give a int or float' in reason for reason in facts["unusable"])
    assert all(reason in summary_of(facts) for reason in facts["unusable"])


def test_agreement_with_a_judgement_that_was_there_is_counted(tmp_path: Path) -> None:
    records = [
        {"gold": "1", "pred": "1", "correct": True},
        {"gold": "1", "pred": "1", "correct": False},
        {"gold": "1", "pred": "2", "correct": "no"},
    ]
    lines, facts = graded(tmp_path, records)
    assert (facts["judged_before"], facts["agreeing"]) == (2, 1)
    assert "1 of 2 agree" in summary_of(facts)
    assert [json.loads(line)["correct"] for line in lines] == [True, True, False]


def test_what_a_grader_cannot_judge_is_counted_apart_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRADERS, "math", obey)
    records = [{"gold": "1", "pred": word} for word in ("1", "spin", "1", "raise", "1")]
    lines, facts = graded(tmp_path, records, "jobs=1", "limit=0.5")
    assert [json.loads(line)["verdict"] for line in lines] == ["correct", "timeout", "correct", "error", "correct"]
    assert [json.loads(line)["correct"] for line in lines] == [True, False, True, False, True]
    assert facts["verdicts"] == {"correct": 3, "wrong": 0, "no_answer": 0, "timeout": 1, "error": 1}


def test_an_empty_file_gives_an_empty_file(tmp_path: Path) -> None:
    lines, facts = graded(tmp_path, [])
    assert (lines, facts["graded"], facts["accuracy"]) == ([], 0, None)
    assert summary_of(facts) == "0 records graded by math"


def test_standard_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"gold": "1", "pred": "1.0"}\n')))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=output))
    grade("-", "-", "math", ["jobs=1"])
    assert json.loads(output.getvalue())["correct"]


@pytest.mark.parametrize(
    ("grader", "settings", "message"),
    [
        ("maths", [], '--grader: got "maths"; use one of math, exact, paper'),
        ("math", ["job=1"], '"job=1": is no setting; use jobs=N or limit=SECONDS'),
        ("math", ["jobs=0"], 'jobs: got "0"'),
        ("math", ["limit=0"], 'limit: got "0"'),
        ("math", ["limit=nan"], 'limit: got "nan"'),
        ("math", ["limit=soon"], 'limit: got "soon"'),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, grader: str, settings: list[str], message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"gold": "1", "pred": "1"}\n', encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        grade(str(source), str(tmp_path / "out.jsonl"), grader, settings)
    assert message in str(raised.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"gold": "1", "pred": "1"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="is the input too"):
        grade(str(source), str(source))
    with pytest.raises(ConfigError, match="is no file"):
        grade(str(tmp_path / "absent.jsonl"), str(tmp_path / "out.jsonl"))
    assert source.read_text(encoding="utf-8") == '{"gold": "1", "pred": "1"}\n'


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        ({"gold": "\\frac{1}{2}", "pred": "\\dfrac{1}{2}"}, "correct"),
        ({"gold": "\\frac{1}{2}", "pred": "0.5"}, "wrong"),
        ({"gold": "1000", "pred": "1,000."}, "correct"),
        ({"gold": "12", "response": "so \\boxed{12}."}, "correct"),
        ({"gold": "12", "pred": "so \\boxed{12}."}, "correct"),
        ({"gold": "12", "response": "I do not know"}, "no_answer"),
    ],
)
def test_the_exact_grader_compares_texts(tmp_path: Path, record: Record, verdict: str) -> None:
    assert one(tmp_path, record, grader="exact")["verdict"] == verdict


def seconds_for(tmp_path: Path, number: int) -> float:
    forms = [
        "{0}",
        "\\frac{{{0}}}{{2}}",
        "x = {0}",
        "({0}, 2)",
        "\\sqrt{{{0}}}",
        "{0}\\pi",
        "{0},000",
        "{0} \\text{{ cm}}",
        "\\{{1, {0}\\}}",
        "{0}x",
    ]
    records = [{"gold": forms[n % 10].format(n % 97), "pred": forms[n % 10].format(n % 89)} for n in range(number)]
    start = time.monotonic()
    _, facts = graded(tmp_path, records)
    assert facts["verdicts"]["error"] == facts["verdicts"]["timeout"] == 0
    assert facts["graded"] == number
    return time.monotonic() - start


def test_a_thousand_pairs_take_seconds(tmp_path: Path) -> None:
    assert seconds_for(tmp_path, 1000) < 30


@pytest.mark.slow
def test_ten_thousand_pairs_take_less_than_a_minute(tmp_path: Path) -> None:
    assert seconds_for(tmp_path, 10_000) < 60


def test_verdicts_are_those_that_a_grade_may_have(tmp_path: Path) -> None:
    _, facts = graded(tmp_path, [{"gold": "1", "pred": "1"}])
    assert tuple(facts["verdicts"]) == VERDICTS


def test_grading_imports_no_torch_and_no_grader_before_it_grades() -> None:
    code = "import sys, structcot.grade; print('torch' in sys.modules, 'sympy' in sys.modules, 'structcot.grading.math' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False False False\n"
    )
    code = "import sys, structcot.grading.math, structcot.grading.exact; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_graders_are_named(tmp_path: Path) -> None:
    assert list(GRADERS) == ["math", "exact", "paper"]


def test_real_outputs_of_the_papers_models_get_the_scores_that_they_had(tmp_path: Path) -> None:
    path = DATA / "traces" / "paper_outputs.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: outputs of the paper's models are not part of the project")
    to = tmp_path / "out.jsonl"
    facts = grade(str(path), str(to), "math")
    rows = [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()]
    assert facts["graded"] == len(rows)
    assert facts["verdicts"]["error"] == facts["verdicts"]["timeout"] == 0
    assert sum(row["correct"] is row["score"] for row in rows) >= 0.95 * len(rows)
