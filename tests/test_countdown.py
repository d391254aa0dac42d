"""Countdown demonstrations: every record proves itself, the search in it is real, and the same seed writes the same bytes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot import countdown
from structcot.countdown import DIFFICULTIES, Difficulty, make_demonstrations, verify, write_countdown
from structcot.countdown_check import evaluate
from structcot.countdown_words import TAGS
from structcot.errors import ConfigError, DataError

SEEDS = st.integers(0, 2**32)


def records(num_records: int = 1, seed: int = 0, difficulty: Difficulty = DIFFICULTIES["easy"]) -> list[dict[str, Any]]:
    return list(make_demonstrations(num_records=num_records, seed=seed, difficulty=difficulty))


def reply_of(record: dict[str, Any]) -> str:
    return record["conversations"][1]["value"]


def with_reply(record: dict[str, Any], reply: str) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    changed["conversations"][1]["value"] = reply
    return changed


def with_answer(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """Change the answer consistently, so that only its arithmetic can give it away."""
    reply = re.sub(r"\\boxed\{[^{}]*\}", lambda _: rf"\boxed{{{answer}}}", reply_of(record))
    return with_reply(record, reply) | {"answer": answer}


@settings(max_examples=60)
@given(seed=SEEDS, low=st.integers(3, 4), spread=st.integers(0, 1), max_number=st.integers(6, 60), max_target=st.integers(30, 300))
def test_every_record_verifies(seed: int, low: int, spread: int, max_number: int, max_target: int) -> None:
    difficulty = Difficulty(
        min_numbers=low, max_numbers=low + spread, max_number=max_number, max_target=max_target, min_steps=4, max_steps=80
    )
    for record in records(3, seed, difficulty):
        verify(record)
        assert low <= len(record["numbers"]) <= low + spread
        assert max(record["numbers"]) <= max_number
        assert 1 <= record["target"] <= max_target


@settings(max_examples=30)
@given(seed=SEEDS)
def test_the_tags_stand_once_each_and_in_order(seed: int) -> None:
    reply = reply_of(records(1, seed)[0])
    assert [reply.count(tag) for tag in TAGS] == [1, 1, 1, 1]
    assert [reply.find(tag) for tag in TAGS] == sorted(reply.find(tag) for tag in TAGS)
    assert reply.startswith(TAGS[0] + "\n\n")
    assert reply.endswith(TAGS[3])
    thought = reply[len(TAGS[0]) : reply.index(TAGS[1])]
    assert len(thought.strip().split("\n\n")) >= 4


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_countdown(tmp_path / name, num_records=40, seed=seed)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again
    assert first != other
    assert [json.loads(line)["id"] for line in first.splitlines()][:2] == ["countdown-000000", "countdown-000001"]


def test_a_longer_file_begins_with_the_shorter_one() -> None:
    assert records(60, seed=5)[:20] == records(20, seed=5)


def test_no_problem_comes_twice() -> None:
    tight = Difficulty(min_numbers=3, max_numbers=3, max_number=4, max_target=12, min_steps=2, max_steps=12)
    problems = [(tuple(sorted(record["numbers"])), record["target"]) for record in records(90, seed=0, difficulty=tight)]
    assert len(set(problems)) == 90


def test_more_records_than_problems_is_a_config_error() -> None:
    tiny = Difficulty(min_numbers=3, max_numbers=3, max_number=2, max_target=5, min_steps=2, max_steps=12)
    with pytest.raises(ConfigError, match="at most 20 distinct problems"):
        make_demonstrations(num_records=21, seed=0, difficulty=tiny)
    # Some of the 20 have no solution, which only the search can find out.
    with pytest.raises(ConfigError, match="not enough distinct problems"):
        records(20, difficulty=tiny)


@pytest.mark.parametrize(
    "change",
    [
        {"min_numbers": 2},
        {"max_numbers": 7},
        {"min_numbers": 4, "max_numbers": 3},
        {"max_number": 0},
        {"max_target": 0},
        {"min_steps": 9, "max_steps": 8},
        {"min_numbers": 6, "max_numbers": 6, "min_steps": 1, "max_steps": 4},
    ],
)
def test_a_difficulty_that_makes_no_sense_is_a_config_error(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="countdown: got"):
        make_demonstrations(num_records=1, seed=0, difficulty=replace(Difficulty(), **change))


def test_most_traces_backtrack_and_some_do_not() -> None:
    backtracking = [bool(re.search(r"\b[Bb]ack to\b|\breturn to\b", reply_of(record))) for record in records(300)]
    assert 0.8 < sum(backtracking) / 300 < 1.0


def test_the_wording_varies() -> None:
    many = records(300)
    for place in (0, 1):
        texts = [re.sub(r"[0-9]+", "N", record["conversations"][place]["value"]) for record in many]
        openings = {text.split("\n\n")[place] for text in texts}
        assert len(openings) >= 5
    for marker in ("Wait", "Alternatively", "Let me check", "That does not work because"):
        assert 10 < sum(marker in reply_of(record) for record in many) < 290


def test_default_demonstrations_are_short() -> None:
    assert max(len(reply_of(record)) for record in records(300)) < 1000


def test_reasons_are_true() -> None:
    """What is claimed of a move can be read back from the text and holds."""
    for record in records(200, seed=1) + records(5, seed=1, difficulty=DIFFICULTIES["hard"]):
        reply, target = reply_of(record), record["target"]
        for value in re.findall(rf"because ([0-9]+) divides {target}\b", reply):
            assert target % int(value) == 0
        for value, distance in re.findall(r"\b([0-9]+) is off by ([0-9]+)", reply):
            assert abs(int(value) - target) == int(distance)
        for line in re.findall(r"(?m)^.*(?:these are all below|all of that is too small).*$", reply):
            assert all(int(value) < target for value in re.findall(r"= ([0-9]+)", line))
        for line in re.findall(r"(?m)^.*(?:everything is above|all of that is too large).*$", reply):
            assert all(int(value) > target for value in re.findall(r"= ([0-9]+)", line))


def test_the_told_search_is_consistent() -> None:
    """Each move joins two numbers that are on the table, and leaves what it says."""
    move = re.compile(r"([0-9]+) ([-+*/]) ([0-9]+) = ([0-9]+)[^=]*?(?:leaves|have|remain|are|Then|So)[^=0-9]*?([0-9]+(?:, [0-9]+)+)")
    checked = 0
    for record in records(100, seed=2) + records(3, seed=2, difficulty=DIFFICULTIES["hard"]):
        seen = {tuple(sorted(record["numbers"]))}
        for step in reply_of(record).split("\n\n"):
            for left, _, right, result, rest in move.findall(step.split(". Let me go back")[-1]):
                remaining = sorted(map(int, rest.split(", ")))
                before = remaining.copy()
                before.remove(int(result))
                assert tuple(sorted([*before, int(left), int(right)])) in seen
                seen.add(tuple(remaining))
                checked += 1
    assert checked > 200


def test_six_numbers_give_long_traces() -> None:
    for record in records(4, difficulty=DIFFICULTIES["hard"]):
        verify(record)
        assert len(record["numbers"]) == 6
        assert len(reply_of(record)) > 2000


MUTATIONS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "another value": (lambda record: with_answer(record, record["answer"] + " + 1"), "not the target"),
    "number left out": (lambda record: with_answer(record, str(record["target"])), "uses"),
    "number used twice": (
        lambda record: with_answer(record, f"{record['answer']} + {record['numbers'][0]} - {record['numbers'][0]}"),
        "uses",
    ),
    "a call": (lambda record: with_answer(record, "print(1)"), "no arithmetic expression"),
    "a power": (lambda record: with_answer(record, "2 ** 3"), "no arithmetic expression"),
    "a sign": (lambda record: with_answer(record, "-3 + 4"), "no arithmetic expression"),
    "a fraction of zero": (lambda record: with_answer(record, "1 / (2 - 2)"), "no arithmetic expression"),
    "box differs": (lambda record: record | {"answer": f"({record['answer']})"}, "boxes"),
    "target changed": (lambda record: record | {"target": record["target"] + 1}, "the question speaks of"),
    "numbers changed": (lambda record: record | {"numbers": [*record["numbers"], 1]}, "the question speaks of"),
    "target is text": (lambda record: record | {"target": str(record["target"])}, "must be whole"),
    "false equation": (lambda record: with_reply(record, re.sub(r"= ([0-9]+)", r"= 1\1", reply_of(record), count=1)), "which is false"),
    "tag missing": (lambda record: with_reply(record, reply_of(record).replace(TAGS[1], "")), "once each"),
    "tag doubled": (lambda record: with_reply(record, reply_of(record) + TAGS[3]), "once each"),
    "tags swapped": (lambda record: with_reply(record, f"{TAGS[1]}{TAGS[0]}{TAGS[2]}{TAGS[3]}"), "in this order"),
    "a turn too many": (lambda record: record | {"conversations": record["conversations"] * 2}, "one user and one assistant"),
    "no system prompt": (lambda record: record | {"system": None}, "system prompt"),
}


@pytest.mark.parametrize("kind", MUTATIONS)
@settings(max_examples=10)
@given(seed=SEEDS)
def test_a_changed_record_fails(kind: str, seed: int) -> None:
    change, message = MUTATIONS[kind]
    record = records(1, seed)[0]
    with pytest.raises(DataError, match=message):
        verify(change(record))
    verify(record)


@settings(max_examples=200)
@given(
    st.recursive(
        st.integers(0, 99).map(str), lambda inner: st.builds(lambda a, op, b: f"({a} {op} {b})", inner, st.sampled_from("+-*/"), inner)
    )
)
def test_the_evaluator_agrees_with_python(expression: str) -> None:
    exact = re.sub(r"([0-9]+)", r"Fraction(\1)", expression)
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(DataError, match="no arithmetic expression"):
            evaluate(expression)
        return
    assert evaluate(expression) == (expected, [int(number) for number in re.findall(r"[0-9]+", expression)])


@settings(max_examples=200)
@given(seed=SEEDS, count=st.integers(3, 6))
def test_written_expressions_keep_the_value_of_the_moves(seed: int, count: int) -> None:
    """The parentheses that are left out change nothing."""
    rng = countdown.random.Random(seed)
    items = [countdown.Item(number, str(number)) for number in (rng.randint(1, 12) for _ in range(count))]
    given = sorted(item.value for item in items)
    while len(items) > 1:
        rng.shuffle(items)
        items = [rng.choice(countdown._moves(items[0], items[1])).result, *items[2:]]
    value, used = evaluate(items[0].text)
    assert value == items[0].value
    assert sorted(used) == given


def test_a_record_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(record: dict[str, Any]) -> None:
        if record["id"] == "countdown-000002":
            raise DataError("planted")

    monkeypatch.setattr(countdown, "verify", refuse)
    (tmp_path / "x.jsonl").write_text("old")
    with pytest.raises(DataError, match="planted"):
        write_countdown(tmp_path / "x.jsonl", num_records=5, seed=0)
    assert (tmp_path / "x.jsonl").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
