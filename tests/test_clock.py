"""Clock puzzles: one right way each, searches that are true in every step, careless ones that go wrong, and files without a leak."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from structcot.clock.behaviour import SHARES, behaviour_table, counts_of
from structcot.clock.model import CONTEXT
from structcot.clock.puzzle import HOURS, Puzzle, all_puzzles
from structcot.clock.search import Search, demonstration
from structcot.clock.sets import OPERATIONS_PER_ROW, operations, purpose_of
from structcot.clock.skills import skill_shares
from structcot.data.render import load_tokenizer
from structcot.errors import ConfigError
from structcot.fetch import fetch
from structcot.structure.segmenters import by_marker, whole_steps
from structcot.tags import read_answer

seeds = st.integers(0, 10_000)
NAMES = ("base", "demonstrations", "wrong", "validation", "test", "skills")
EQUATION = r"(\d+) ([-+*]) (\d+) = (\d+)"
BACK = "Wait, going back."
OPENING = re.compile(rf"{EQUATION}, left (\d+)\.")
TRIAL = re.compile(rf"{EQUATION}, {EQUATION}(, yes)?\.")
CHECK = re.compile(rf"Check: {EQUATION}, {EQUATION}, {EQUATION}(, yes)?\.")


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch("clock", tmp_path_factory.mktemp("clock") / "clock", num_records=60, seed=3)


@cache
def every_puzzle() -> list[Puzzle]:
    return list(all_puzzles())


def puzzle_of(seed: int) -> Puzzle:
    return Random(seed).choice(every_puzzle())


def records(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").open(encoding="utf-8")]


def worked_out(left: str, operator: str, right: str) -> int:
    """The operation by other means than those that wrote it."""
    return eval(f"({int(left)} {operator} {int(right)}) % {HOURS}")  # two numbers and a sign


def asked(question: str) -> tuple[int, tuple[int, ...]]:
    target, *numbers = map(int, re.findall(r"\d+", question))
    return target, tuple(numbers)


def right_answers(question: str) -> list[str]:
    """Every right answer, by trying all."""
    target, (a, b, c) = asked(question)
    found = []
    for (x, y, z), one, other in product([(a, b, c), (a, c, b), (b, c, a)], "+-*", "+-*"):
        if worked_out(str(worked_out(str(x), one, str(y))), other, str(z)) == target:
            found.append(f"{x} {one} {y} {other} {z}")
    return found


def follow(thought: str, question: str, *, careful: bool) -> str:
    """Walk a thought step by step, and fail at the first that the search would not take; the way that it ends with."""
    target, numbers = asked(question)
    first, *steps, check = thought.strip().split("\n\n")
    assert first == f"Need {target}."
    starts, trials, is_back = [], set(), True
    for step in steps:
        if step == BACK:
            assert not is_back
            is_back = True
            continue
        if match := OPENING.fullmatch(step):
            left, operator, right, result, rest = match.groups()
            assert is_back
            is_back = False
            assert sorted(map(int, (left, right, rest))) == sorted(numbers)
            assert len(trials) in (0, 3)
            assert (left, operator, right) not in [start[:3] for start in starts]
            starts.append((left, operator, right, result, rest))
            trials = set()
        else:
            match = TRIAL.fullmatch(step)
            assert match, step
            left, operator, right, result, *compared, yes = match.groups()
            assert (left, right) == starts[-1][3:]
            assert operator not in trials
            trials.add(operator)
            assert compared[:3] == [result, "-", str(target)]
            assert (compared[3] == "0") == (yes is not None)
            assert not yes or step is steps[-1]
            assert not careful or worked_out(*compared[:3]) == int(compared[3])
        assert not careful or worked_out(left, operator, right) == int(result)
    match = CHECK.fullmatch(check)
    assert match
    a, one, b, _, _, other, c, result, *compared, yes = match.groups()
    assert compared[:3] == [result, "-", str(target)]
    assert (compared[3] == "0") == (yes is not None)
    return f"{a} {one} {b} {other} {c}"


def test_there_are_thousands_of_puzzles_and_more_are_refused(tmp_path: Path) -> None:
    assert len(every_puzzle()) > 20_000
    with pytest.raises(ConfigError, match="clock: for training 175,100 puzzles are needed"):
        fetch("clock", tmp_path / "clock", num_records=100_000)


@given(seeds)
def test_there_is_exactly_one_right_way(seed: int) -> None:
    puzzle = puzzle_of(seed)
    assert right_answers(puzzle.question) == [puzzle.way.text]


@given(seeds, seeds)
def test_a_careful_search_is_true_in_every_step(seed: int, order: int) -> None:
    puzzle = puzzle_of(seed)
    text, way = demonstration(Search(puzzle=puzzle, rng=Random(order)))
    answer = read_answer(text)
    assert way == puzzle.way
    assert not answer.defect
    assert answer.solution.strip() == f"\\boxed{{{puzzle.way.text}}}"
    assert follow(answer.thought, puzzle.question, careful=True) == puzzle.way.text


def test_the_same_puzzle_is_searched_in_many_orders() -> None:
    puzzle = puzzle_of(0)
    texts = {demonstration(Search(puzzle=puzzle, rng=Random(order)))[0] for order in range(400)}
    assert len({text.split("\n\n")[2] for text in texts}) == 9, "any pair and any operation may come first"
    assert len(texts) >= 24, "36 orders, of which some differ only after the end"


def test_a_step_is_a_step_to_the_marker_segmenter() -> None:
    puzzle = puzzle_of(1)
    thought = read_answer(demonstration(Search(puzzle=puzzle, rng=Random(2)))[0]).thought
    kinds = Counter(step.type for step in whole_steps(by_marker(thought)))
    assert kinds["backtracking"] == thought.count("Wait,") > 0
    assert kinds["verification"] == 1


def test_careless_searches_end_wrong_in_several_ways_and_stay_in_form(clock: Path) -> None:
    faults: Counter[str] = Counter()
    for right, wrong in zip(records(clock, "demonstrations"), records(clock, "wrong"), strict=True):
        assert right["messages"][0] == wrong["messages"][0]
        assert right["correct"]
        assert not wrong["correct"]
        question, answer = wrong["messages"][0]["content"], read_answer(wrong["messages"][1]["content"])
        boxed = answer.solution.strip().removeprefix("\\boxed{").removesuffix("}")
        assert boxed != wrong["gold"] == right["gold"]
        assert follow(answer.thought, question, careful=False) == boxed
        faults["false hit"] += ", yes." in answer.thought.rpartition("Check")[0]
        faults["missed"] += ", yes." not in answer.thought
        faults["went back"] += "Wait," in answer.thought
    assert min(faults.values()) >= 10, faults


def test_what_is_tested_was_not_learned_from_in_any_order(clock: Path) -> None:
    seen: dict[str, set[tuple[int, ...]]] = {}
    for name in ("base", "demonstrations", "validation", "test"):
        questions = [record["messages"][0]["content"] if "messages" in record else record["question"] for record in records(clock, name)]
        puzzles = [question for question in questions if question.startswith("make")]
        assert len(set(puzzles)) == len(puzzles)
        seen[name] = {tuple(sorted(asked(question)[1])) for question in puzzles}
    assert not seen["base"] & seen["test"]
    assert not seen["base"] & seen["validation"]
    assert not seen["demonstrations"] & (seen["test"] | seen["validation"])
    assert not seen["validation"] & seen["test"]
    assert {purpose_of(numbers) for numbers in seen["test"]} == {"test"}


def test_no_puzzle_is_answered_before_it_is_searched(clock: Path) -> None:
    answered = {record["messages"][0]["content"] for record in records(clock, "base")}
    assert not answered & {record["messages"][0]["content"] for record in records(clock, "demonstrations")}


def test_operations_are_worked_out_and_compared_rightly(clock: Path) -> None:
    hits = 0
    for record in records(clock, "skills"):
        need, *_ = map(int, re.findall(r"\d+", record["question"]))
        lines = record["answer"].split("\n\n")
        assert len(lines) == OPERATIONS_PER_ROW
        assert record["question"] == f"need {need}: " + ", ".join(line.partition(" =")[0] for line in lines)
        for line in lines:
            left, operator, right, result, *compared, yes = TRIAL.fullmatch(line).groups()  # pyright: ignore
            assert worked_out(left, operator, right) == int(result)
            assert compared[:3] == [result, "-", str(need)]
            assert worked_out(*compared[:3]) == int(compared[3])
            assert (yes is not None) == (compared[3] == "0")
            hits += yes is not None
    assert hits > 400


@pytest.fixture(scope="module")
def tokenizer(clock: Path) -> Any:
    """The tokenizer as every command loads it."""
    return load_tokenizer(clock / "model")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds)
def test_every_word_is_one_token_and_nothing_is_lost(tokenizer: Any, seed: int) -> None:
    rng = Random(seed)
    puzzle = puzzle_of(seed)
    texts = [puzzle.question, demonstration(Search(puzzle=puzzle, rng=rng, slip_rate=0.2))[0], *operations(rng), "07 + 93 = 5, yes."]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokens) == text
        words = re.findall(r"<\|[a-z_]+\|>|\n\n|\\boxed\{| ?[A-Za-z]+| ?\d\d?| ?[-+*=]|[:,.}]", text)
        assert [tokenizer.decode([token]) for token in tokens] == words


def test_what_has_no_word_of_its_own_is_spelled(tokenizer: Any) -> None:
    text = "Hmm, é 123 \t again"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_model_is_small_and_whole_and_the_texts_fit_its_context(clock: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(clock / "model")
    assert model.config.model_type == "qwen2"
    assert 3e6 < sum(weight.numel() for weight in model.parameters()) < 4e6
    tokenizer = load_tokenizer(clock / "model")
    lengths = [
        len(tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=True)["input_ids"])  # pyright: ignore
        for name in ("demonstrations", "wrong", "base")
        for record in records(clock, name)
    ]
    assert max(lengths) < CONTEXT


def test_skills_are_shares_of_right_lines() -> None:
    right = "7 * 8 = 18, 18 - 5 = 13.\n\n2 + 3 = 5, 5 - 5 = 0, yes."
    assert skill_shares([(right, right)]) == {"results": 1.0, "comparisons": 1.0}
    assert skill_shares([("7 * 8 = 18, 18 - 5 = 12.", right)]) == {"results": 0.5, "comparisons": 0.0}


def test_the_same_parameters_give_the_same_bytes_and_another_seed_others(clock: Path, tmp_path: Path) -> None:
    again, other = (fetch("clock", tmp_path / name, num_records=60, seed=seed) for name, seed in (("again", 3), ("other", 4)))
    for name in NAMES:
        assert (again / f"{name}.jsonl").read_bytes() == (clock / f"{name}.jsonl").read_bytes()
        assert (other / f"{name}.jsonl").read_bytes() != (clock / f"{name}.jsonl").read_bytes()
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (clock / weights).read_bytes()


def test_what_is_there_is_not_written_again(clock: Path) -> None:
    before = (clock / "test.jsonl").stat().st_mtime_ns
    assert fetch("clock", clock, num_records=60, seed=3) == clock
    assert (clock / "test.jsonl").stat().st_mtime_ns == before


def shares_in(text: str) -> dict[str, str]:
    heads, _, row = (line.strip("| ").split(" | ") for line in text.splitlines())
    return dict(zip(heads, row[1:], strict=True))


def test_careful_searches_behave_and_careless_ones_compute_wrongly_alone(clock: Path) -> None:
    shares = {}
    for name in ("demonstrations", "wrong"):
        answers = [(one["messages"][0]["content"], one["messages"][1]["content"], name != "wrong") for one in records(clock, name)]
        shares[name] = shares_in(behaviour_table({name: answers}))
    assert set(shares["demonstrations"].values()) == {"100.0"}
    wrong = {key: float(value) for key, value in shares["wrong"].items()}
    assert 85 < wrong["operations right"] < 95
    assert (wrong["openings allowed"], wrong["openings new"], wrong["trials carried on"]) == (100, 100, 100)
    assert (wrong["yes is true"], wrong["right"]) == (0, 0)


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("5 + 7 = 11, left 8.", "operations right"),
        ("5 + 7 = 12, left 7.", "openings allowed"),
        ("7 + 5 = 12, left 8.", "openings allowed"),
        ("5 + 7 = 12, left 8.\n\nWait, going back.\n\n5 + 7 = 12, left 8.", "openings new"),
        ("5 + 7 = 12, left 8.\n\n11 + 8 = 0, 0 - 10 = 9.", "trials carried on"),
        ("5 + 7 = 12, left 8.\n\n12 + 7 = 0, 0 - 10 = 9.", "trials carried on"),
        ("5 + 7 = 12, left 8.\n\n12 + 8 = 1, 1 - 9 = 11.", "trials carried on"),
        ("5 + 7 = 12, left 8.\n\n12 + 8 = 1, 1 - 10 = 0, yes.\n\n\\boxed{5 + 7 + 8}", "yes is true"),
    ],
)
def test_what_goes_wrong_in_an_output_is_told_apart(lines: str, name: str) -> None:
    counts = counts_of("make 10 from 5 7 8", lines)
    assert counts[name] < counts[f"all {name}"]
    others = {key for key in SHARES if counts[key] < counts[f"all {key}"]} - {name}
    assert others <= {"operations right"}
