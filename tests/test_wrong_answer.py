"""Right records answered wrongly: who judges, who gets which answer, and what is left out or stays."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from structcot.cli import run_command
from structcot.errors import ConfigError, DataError
from structcot.grading.case import Case
from structcot.grading.graders import GRADERS
from structcot.perturb.command import perturb
from structcot.perturb.judge import judge
from structcot.perturb.spec import make_spec
from structcot.traces import read_lines, read_trace

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
RIGHT, WRONG = "12", "7"
DISAGREE = "the graders disagree"

Record = dict[str, Any]
Facts = dict[str, Any]


def record(name: str, problem: str, answer: str, **fields: Any) -> Record:
    """A record whose text tells its name, so that an answer can be traced to the record that it comes from."""
    text = f"<think>\nThought of {name}.\n</think>\nIt is \\boxed{{{answer}}}."
    return {"id": name, "problem": problem, "gold": RIGHT, "response": text, **fields}


def write(path: Path, records: Sequence[Record]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered_wrongly(tmp_path: Path, records: Sequence[Record], *settings: str, **options: Any) -> tuple[list[Record], Facts]:
    source, to = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    facts = perturb(str(source), str(to), ["jobs=1", *settings], kind="wrong-answer", **options)
    return read(to), facts


def givers(records: Sequence[Record]) -> dict[str, str]:
    """For each record the name of that whose text it holds."""
    return {one["id"]: one["response"].split("Thought of ")[1].split(".\n")[0] for one in records}


MIXED = [
    record("r1", "P1", RIGHT),
    record("w1", "P1", WRONG),
    record("r2", "P2", RIGHT),
    record("r3", "P3", RIGHT),
    record("w3", "P3", "8"),
    record("r3b", "P3", "12.0"),
]


# Pairs


def test_right_records_get_a_wrong_answer_to_the_same_problem(tmp_path: Path) -> None:
    records = [record("r1", "P1", RIGHT), record("w1", "P1", WRONG), record("w2", "P2", "8"), record("r2", "P2", RIGHT)]
    out, facts = answered_wrongly(tmp_path, records)
    assert givers(out) == {"r1": "w1", "w1": "w1", "w2": "w2", "r2": "w2"}
    assert [one["id"] for one in out] == ["r1", "w1", "w2", "r2"]
    assert out[0] == {**records[0], "response": records[1]["response"]}
    assert facts["changed"] == 2
    assert facts["judged"] == {"answers_used_more_than_once": 0, "right": 2, "wrong": 2}


def test_a_right_record_whose_problem_nobody_got_wrong_stays_with_that_reason(tmp_path: Path) -> None:
    records = [record("r1", "P1", RIGHT), record("w1", "P1", WRONG), record("r2", "P2", RIGHT)]
    out, facts = answered_wrongly(tmp_path, records)
    assert givers(out) == {"r1": "w1", "w1": "w1", "r2": "r2"}
    assert facts["stages"][0]["not_applied"] == {"already wrong": 1, "no wrong answer to this problem": 1}


@pytest.mark.parametrize(
    "disputed",
    [
        record("d", "P1", WRONG, correct=True),
        record("d", "P1", RIGHT, correct=False),
        record("d", "P1", RIGHT, score=False),
        record("d", "P1", "\\frac12", gold="0.5"),
        record("d", "P1", "24/2"),
    ],
)
def test_what_the_graders_disagree_on_is_left_out_and_counted(tmp_path: Path, disputed: Record) -> None:
    out, facts = answered_wrongly(tmp_path, [record("r", "P1", RIGHT), disputed, record("w", "P1", WRONG)])
    assert givers(out) == {"r": "w", "w": "w"}
    assert facts["left_out"] == {DISAGREE: 1}
    assert facts["judged"]["disputed"] == 1
    assert facts["records"] == 3
    lines = read(tmp_path / "out.records.jsonl")
    assert [line.get("left_out", False) for line in lines] == [False, True, False]
    assert lines[1]["reason"] == DISAGREE
    assert json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))["left_out"] == {DISAGREE: 1}


def test_what_cannot_be_judged_stays_as_it_is_with_a_reason(tmp_path: Path) -> None:
    no_gold = record("a", "P1", RIGHT)
    del no_gold["gold"]
    one_grader = {**no_gold, "id": "b", "correct": True}
    no_problem = record("c", "", RIGHT)
    no_answer = {**record("d", "P1", RIGHT), "response": "<think>\nThought of d.\n</think>\nI give up."}
    unjudged = [no_gold, one_grader, no_problem, no_answer]
    out, facts = answered_wrongly(tmp_path, [*unjudged, record("r", "P1", RIGHT), record("w", "P1", WRONG)])
    assert out[:4] == unjudged
    assert facts["judged"] == {"answers_used_more_than_once": 0, "right": 1, "unjudged": 4, "wrong": 1}
    reasons = facts["stages"][0]["not_applied"]
    assert {reason.split(";")[0]: count for reason, count in reasons.items()} == {
        "already wrong": 1,
        "too few graders: no reference answer": 2,
        "no problem found": 1,
        "no final answer in the text": 1,
    }
    assert "no final answer" in read(tmp_path / "out.records.jsonl")[3]["reason"]


def test_a_line_that_holds_no_answer_passes_as_it_is_and_is_reported(tmp_path: Path) -> None:
    source, to = write(tmp_path / "in.jsonl", MIXED), tmp_path / "out.jsonl"
    source.write_bytes(b'not {json\n{"a":  1}\n' + source.read_bytes().rstrip(b"\n"))
    facts = perturb(str(source), str(to), ["jobs=1"], kind="wrong-answer")
    assert to.read_bytes().startswith(b'not {json\n{"a":  1}\n')
    assert sum(facts["unusable"].values()) == 2
    assert [line["reason"].split(":")[0] for line in read(tmp_path / "out.records.jsonl")[:2]] == ["not JSON", "no answer"]
    answered = [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()[2:]]
    assert givers(answered) == {"r1": "w1", "w1": "w1", "r2": "r2", "r3": "w3", "w3": "w3"}


@pytest.mark.parametrize(("fraction", "changed"), [(0.0, 0), (0.05, 0), (0.08, 1), (0.3, 2), (0.5, 4), (0.64, 4), (0.65, 5), (1.0, 7)])
def test_the_fraction_of_right_records_is_rounded_to_the_nearest_number(tmp_path: Path, fraction: float, changed: int) -> None:
    records = [record(f"r{number}", "P", RIGHT) for number in range(7)] + [record("w", "P", WRONG)]
    out, facts = answered_wrongly(tmp_path, records, fraction=fraction)
    assert sum(giver != name for name, giver in givers(out).items()) == facts["changed"] == changed


def test_a_smaller_fraction_changes_a_part_of_what_a_larger_one_changes(tmp_path: Path) -> None:
    records = [record(f"{kind}{number}", f"P{number}", answer) for number in range(12) for kind, answer in (("r", RIGHT), ("w", WRONG))]
    changed = []
    for fraction in (0.25, 0.5, 1.0):
        out, _ = answered_wrongly(tmp_path, records, fraction=fraction)
        changed.append({name for name, giver in givers(out).items() if giver != name})
    assert changed[0] < changed[1] < changed[2] == {f"r{number}" for number in range(12)}


def test_the_seed_chooses_and_the_same_seed_chooses_the_same(tmp_path: Path) -> None:
    records = [record(f"{kind}{number}", f"P{number}", answer) for number in range(12) for kind, answer in (("r", RIGHT), ("w", WRONG))]
    first, again, other = (answered_wrongly(tmp_path, records, fraction=0.5, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_fraction_of_0_changes_not_a_byte_and_judges_nothing(tmp_path: Path) -> None:
    source, to = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    content = b'{"response":"a \\u00e9",   "problem": "P"}\nno json\n\n{"response": "b"}\n'
    source.write_bytes(content)
    for mode in ("clean", "paper"):
        perturb(str(source), str(to), ["jobs=1"], kind="wrong-answer", fraction=0.0, mode=mode)
        assert to.read_bytes() == content


def test_who_gets_which_answer_does_not_depend_on_the_order_of_the_records(tmp_path: Path) -> None:
    records = [record(f"r{number}", f"P{number % 4}", RIGHT) for number in range(20)]
    records += [record(f"w{number}", f"P{number % 4}", WRONG) for number in range(11)]
    found = []
    for seed in range(4):
        random.Random(seed).shuffle(records)
        found.append(givers(answered_wrongly(tmp_path, records, fraction=0.6)[0]))
    assert all(one == found[0] for one in found)
    assert sum(name != giver for name, giver in found[0].items()) == 12


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    records = [record(f"r{number}", f"P{number % 50}", RIGHT, correct=True) for number in range(160)]
    records += [record(f"w{number}", f"P{number % 50}", WRONG, correct=number % 9 == 0) for number in range(60)]
    source = write(tmp_path / "in.jsonl", records)
    outputs = []
    for jobs in (1, 4):
        to = tmp_path / f"out{jobs}.jsonl"
        facts = perturb(str(source), str(to), [f"jobs={jobs}"], kind="wrong-answer", fraction=0.5)
        outputs.append((to.read_bytes(), (tmp_path / f"out{jobs}.records.jsonl").read_bytes(), {**facts, "output": ""}))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("rights", "wrongs", "reused"), [(5, 2, 3), (3, 3, 0), (2, 3, 0), (7, 1, 6), (6, 4, 2)])
def test_each_wrong_answer_is_used_as_rarely_as_possible(tmp_path: Path, rights: int, wrongs: int, reused: int) -> None:
    records = [record(f"r{number}", "P", RIGHT) for number in range(rights)]
    records += [record(f"w{number}", "P", WRONG) for number in range(wrongs)]
    out, facts = answered_wrongly(tmp_path, records)
    uses = Counter(giver for name, giver in givers(out).items() if name != giver)
    assert sum(uses.values()) == rights
    assert max(uses.values()) - min(uses[f"w{number}"] for number in range(wrongs)) <= 1
    assert facts["judged"]["answers_used_more_than_once"] == reused


def test_wrong_answers_may_come_from_another_file(tmp_path: Path) -> None:
    pool = write(tmp_path / "pool.jsonl", [record("x", "P3", RIGHT), record("p1", "P1", WRONG), record("p2", "P2", WRONG)])
    out, facts = answered_wrongly(tmp_path, [record(f"r{n}", f"P{n}", RIGHT) for n in (1, 2, 3)], f"pool={pool}")
    assert givers(out) == {"r1": "p1", "r2": "p2", "r3": "r3"}
    assert facts["judged"] == {"answers_used_more_than_once": 0, "right": 3}


def test_a_pool_of_a_selection_of_wrong_records_never_lets_right_ones_through(tmp_path: Path) -> None:
    pool = write(tmp_path / "pool.jsonl", [record("p1", "P1", WRONG), record("p2", "P2", RIGHT)])
    try:
        out, _ = answered_wrongly(tmp_path, [record("r1", "P1", RIGHT), record("w2", "P2", WRONG)], "select=wrong-only", f"pool={pool}")
    except ConfigError:
        return
    assert not {"r1"} & {one["id"] for one in out if givers([one]) == {"r1": "r1"}}


def test_standard_input_is_read_twice_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", MIXED)
    whole, _ = answered_wrongly(tmp_path, MIXED)
    with source.open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        perturb("-", str(tmp_path / "piped.jsonl"), ["jobs=1"], kind="wrong-answer")
    assert read(tmp_path / "piped.jsonl") == whole


def test_problem_and_reference_are_found_by_dotted_names(tmp_path: Path) -> None:
    records = [
        {**record(name, f"unlike {name}", answer, gold="99"), "meta": {"task": {"text": "P"}, "right": 12}}
        for name, answer in (("r", RIGHT), ("w", WRONG))
    ]
    out, _ = answered_wrongly(tmp_path, records, "problem=meta.task.text", "gold=meta.right")
    assert givers(out) == {"r": "w", "w": "w"}


def test_the_problem_is_the_last_user_turn_whatever_its_white_space(tmp_path: Path) -> None:
    def chat(name: str, problem: str, answer: str) -> Record:
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": f"<think>{name}</think>\\boxed{{{answer}}}"}]
        return {"id": name, "messages": turns, "gold": RIGHT}

    out, facts = answered_wrongly(tmp_path, [chat("r", "What  is\n3 times 4?", RIGHT), chat("w", "What is 3 times 4? ", WRONG)])
    assert facts["changed"] == 1
    assert out[0]["messages"] == [{"role": "user", "content": "What  is\n3 times 4?"}, out[1]["messages"][1]]


def test_no_wrong_answer_at_all_is_one_message_and_exit_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, to = write(tmp_path / "in.jsonl", [record("r", "P", RIGHT), record("", "", RIGHT)]), tmp_path / "out.jsonl"
    monkeypatch.setattr("sys.argv", ["perturb", str(source), str(to), "--kind", "wrong-answer", "jobs=1"])
    with pytest.raises(SystemExit) as ended:
        run_command("perturb")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "holds no answer that its graders call wrong" in message
    assert "no problem found" in message
    assert not to.exists()


# Selection, as in the code of the paper


def test_paper_mode_keeps_the_wrong_records_alone_and_prefixes_their_prompts(tmp_path: Path) -> None:
    out, facts = answered_wrongly(tmp_path, MIXED, mode="paper")
    prefix = "Return your final response within \\boxed{{}}. "
    # One grader there, exact: "12.0" is another text than "12".
    assert [one["id"] for one in out] == ["w1", "w3", "r3b"]
    assert [one["problem"] for one in out] == [f"{prefix}P1", f"{prefix}P3", f"{prefix}P3"]
    assert [one["response"] for one in out] == [MIXED[index]["response"] for index in (1, 4, 5)]
    assert facts["left_out"] == {"not among the wrong ones taken: right": 3}


def test_in_clean_mode_a_selection_takes_only_what_two_graders_call_wrong(tmp_path: Path) -> None:
    out, facts = answered_wrongly(tmp_path, MIXED, "select=wrong-only")
    assert out == [MIXED[1], MIXED[4]]
    assert facts["left_out"] == {"not among the wrong ones taken: disputed": 1, "not among the wrong ones taken: right": 3}


def test_a_selection_of_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is none; ask for more"):
        answered_wrongly(tmp_path, MIXED, mode="paper", fraction=0.1)


# Graders


@pytest.mark.parametrize(
    ("gold", "found", "same_text", "same_value"),
    [
        ("12", "12", True, True),
        ("12", "13", False, False),
        ("12", "$12$", True, True),
        ("12", "12.0", False, True),
        ("0.5", "\\frac12", False, True),
        ("\\frac{1}{2}", "\\dfrac{1}{2}", True, True),
        ("\\frac{1}{2}", "\\frac{2}{1}", False, False),
        ("1000", "1,000", True, True),
        ("(3,\\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True, True),
        ("x^2+1", "1+x^2", False, True),
        ("x^2+1", "x^2-1", False, False),
        ("\\text{A}", "A", True, True),
        ("2\\sqrt{2}", "\\sqrt{8}", False, True),
    ],
)
def test_graders_compare_as_text_and_as_mathematics(gold: str, found: str, same_text: bool, same_value: bool) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install structcot[eval]")
    case = Case(gold=gold, pred=found)
    assert GRADERS["exact"](case).correct is same_text
    assert GRADERS["math"](case).correct is same_value


def test_a_full_stop_behind_an_answer_is_no_part_of_its_text() -> None:
    assert GRADERS["exact"](Case(gold="12", pred="12.")).correct
    assert not GRADERS["exact"](Case(gold="12", pred="1.2")).correct


@pytest.mark.parametrize(
    ("graders", "fields", "verdict"),
    [
        ("two", {"correct": True}, "disputed"),
        ("two", {}, "disputed"),
        ("one", {}, "wrong"),
        ("one", {"correct": True}, "right"),
        ("exact", {"correct": True}, "wrong"),
        ("math-verify", {"correct": False}, "right"),
        ("math", {"correct": False}, "right"),
        ("mine", {"mine": True}, "right"),
        ("mine+exact", {"mine": False}, "wrong"),
        ("mine", {}, "unjudged"),
    ],
)
def test_the_graders_named_are_those_asked(graders: str, fields: Record, verdict: str) -> None:
    own = fields if graders != "two" or not fields else {"correct": False}
    line = json.dumps(record("a", "P", "12.0", **own)).encode()
    spec = make_spec("wrong-answer", 1.0, "clean", [f"graders={graders}"])
    assert judge(read_trace("a:1", line), spec).verdict == verdict


def test_a_judgement_of_its_own_that_is_no_truth_value_is_none() -> None:
    line = json.dumps(record("a", "P", WRONG, score=0.7, correct="yes")).encode()
    assert judge(read_trace("a:1", line), make_spec("wrong-answer", 1.0)).verdict == "wrong"


# Real outputs


def test_real_outputs_are_judged_by_their_score_and_math_verify(tmp_path: Path) -> None:
    path = DATA / "traces" / "paper_outputs.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: outputs of the paper's models are not part of the project")
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install structcot[eval]")
    to = tmp_path / "out.jsonl"
    facts = perturb(str(path), str(to), [], kind="wrong-answer")
    spec = make_spec("wrong-answer", 1.0, "clean", ["graders=score+math-verify"])
    records = [read_trace(*line) for line in read_lines(str(path))]
    verdicts = [judge(trace, spec) for trace in records]
    assert {name: facts["judged"].get(name, 0) for name in ("right", "wrong", "disputed", "unjudged")} == {
        name: sum(one.verdict == name for one in verdicts) for name in ("right", "wrong", "disputed", "unjudged")
    }
    assert all(
        trace.record["score"] is (one.verdict == "right")
        for trace, one in zip(records, verdicts, strict=True)
        if one.verdict in ("right", "wrong")
    )
    wrong_to = {(one.problem, trace.text) for trace, one in zip(records, verdicts, strict=True) if one.verdict == "wrong"}
    kept = [(trace, one) for trace, one in zip(records, verdicts, strict=True) if one.verdict != "disputed"]
    out = read(to)
    assert len(out) == len(kept)
    changed = [(one.problem, new["response"]) for (trace, one), new in zip(kept, out, strict=True) if new["response"] != trace.text]
    assert set(changed) <= wrong_to
    assert len(changed) == facts["changed"] > 0
