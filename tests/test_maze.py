"""Mazes: one way each, searches that are true to them step by step, careless ones that go wrong in many ways, and files without a leak."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from structcot.data.render import load_tokenizer
from structcot.fetch import fetch
from structcot.maze.maze import Maze, draw_maze
from structcot.maze.model import CONTEXT
from structcot.maze.search import Search, demonstration
from structcot.maze.sets import MAX_READ, reading
from structcot.structure.segmenters import by_marker, whole_steps
from structcot.tags import read_answer

seeds = st.integers(0, 10_000)
VISIT = re.compile(r"(\d\d) (none|[\d ]+), (?:(yes)|not (\d\d))\.")
BACK = re.compile(r"Wait, going back to (\d\d): (none|[\d ]+)\.")


@pytest.fixture(scope="module")
def mazes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch("mazes", tmp_path_factory.mktemp("mazes") / "mazes", num_records=60, seed=3)


def records(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").open(encoding="utf-8")]


def rooms_of(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(map(int, text.split()))


def asked(question: str) -> tuple[int, int, dict[int, tuple[int, ...]]]:
    """Start, goal and doors, read from the text of a question by other means than those that wrote it."""
    first, *lines = question.split("\n")
    _, start, _, goal = first.split()
    rooms = [line.split(" ", 1) for line in lines if not line.startswith("look")]
    return int(start), int(goal), {int(name): rooms_of(doors) for name, doors in rooms}


def ways(doors: dict[int, tuple[int, ...]], room: int, goal: int) -> list[tuple[int, ...]]:
    return [(room,)] if room == goal else [(room, *way) for door in doors[room] for way in ways(doors, door, goal)]


def follow(thought: str, start: int, goal: int, doors: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Walk a thought step by step, and fail at the first that a depth-first search would not take; the way that it finds."""
    first, *steps, check = thought.strip().split("\n\n")
    assert first == f"Need {goal}."
    way: list[int] = []
    left: dict[int, set[int]] = {}
    for step in steps:
        if match := VISIT.fullmatch(step):
            room, listed, yes, other = match.groups()
            assert int(room) == start if not way else int(room) in left[way[-1]]
            if way:
                left[way[-1]].discard(int(room))
            way.append(int(room))
            assert (yes is not None) == (int(room) == goal)
            assert rooms_of(listed) == doors[int(room)]
            assert yes or int(other) == goal
            left[int(room)] = set(doors[int(room)])
        else:
            match = BACK.fullmatch(step)
            assert match, step
            assert not left[way.pop()]  # only where nothing is left
            assert int(match[1]) == way[-1]
            assert set(rooms_of(match[2])) == left[way[-1]]
    assert check == "Check: " + ", ".join(f"{room} to {door}" for room, door in itertools.pairwise(way)) + ", yes."
    return tuple(way)


@given(seeds)
def test_there_is_exactly_one_way(seed: int) -> None:
    maze = draw_maze(Random(seed))
    assert ways(dict(maze.doors), maze.path[0], maze.goal) == [maze.path]
    assert asked(maze.question) == (maze.path[0], maze.goal, dict(maze.doors))


@given(seeds, seeds)
def test_a_careful_search_is_true_to_the_maze_in_every_step(seed: int, order: int) -> None:
    maze = draw_maze(Random(seed))
    text, way = demonstration(Search(maze=maze, rng=Random(order)))
    answer = read_answer(text)
    assert way == maze.path
    assert not answer.defect
    assert answer.solution.strip() == f"\\boxed{{{maze.answer}}}"
    assert follow(answer.thought, *asked(maze.question)) == maze.path


def test_the_same_maze_is_searched_in_many_orders() -> None:
    maze = draw_maze(Random(0))
    texts = {demonstration(Search(maze=maze, rng=Random(order)))[0] for order in range(200)}
    assert len(texts) > 40


def test_a_step_is_a_step_to_the_marker_segmenter() -> None:
    maze = draw_maze(Random(1))
    thought = read_answer(demonstration(Search(maze=maze, rng=Random(4)))[0]).thought
    kinds = Counter(step.type for step in whole_steps(by_marker(thought)))
    assert kinds["backtracking"] == thought.count("Wait,") > 0
    assert kinds["verification"] == 1


@pytest.fixture(scope="module")
def tokenizer(mazes: Path) -> Any:
    """The tokenizer as every command loads it."""
    return load_tokenizer(mazes / "model")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds)
def test_every_word_is_one_token_and_nothing_is_lost(tokenizer: Any, seed: int) -> None:
    rng = Random(seed)
    maze = draw_maze(rng)
    texts = [maze.question, demonstration(Search(maze=maze, rng=rng, slip_rate=0.2))[0], *reading(rng), "07 93 5, not 40."]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokens) == text
        words = re.findall(r"<\|[a-z_]+\|>|\n\n|\\boxed\{|\n| ?[A-Za-z]+| ?\d\d?|[:,.}]", text)
        assert [tokenizer.decode([token]) for token in tokens] == words


def test_what_has_no_word_of_its_own_is_spelled(tokenizer: Any) -> None:
    text = "Hmm, é 123 \t again"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_careless_searches_end_wrong_and_go_wrong_in_many_ways(mazes: Path) -> None:
    faults: Counter[str] = Counter()
    for right, wrong in zip(records(mazes, "demonstrations"), records(mazes, "wrong"), strict=True):
        assert right["messages"][0] == wrong["messages"][0]
        assert right["correct"]
        assert not wrong["correct"]
        answer = read_answer(wrong["messages"][1]["content"])
        boxed = answer.solution.strip().removeprefix("\\boxed{").removesuffix("}")
        assert boxed != wrong["gold"] == right["gold"]
        _, goal, doors = asked(wrong["messages"][0]["content"])
        visits = VISIT.findall(answer.thought)
        faults["misread"] += any(rooms_of(listed) != doors[int(room)] for room, listed, _, _ in visits)
        faults["false hit"] += any(yes and int(room) != goal for room, _, yes, _ in visits)
        faults["gave up"] += not any(yes for _, _, yes, _ in visits)
        faults["has backtracking"] += "Wait," in answer.thought
    assert all(faults[name] >= 3 for name in ("misread", "gave up", "has backtracking")), faults
    assert faults["misread"] < 160  # some lose a door that was left instead


def test_no_maze_is_in_two_files_or_twice_in_one(mazes: Path) -> None:
    """What is read out is no maze: of its rooms, hardly ever all doors lead to rooms that are there too."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for name in ("base", "demonstrations", "validation", "test"):
        for record in records(mazes, name):
            question = record["messages"][0]["content"] if "messages" in record else record["question"]
            start, goal, doors = asked(question)
            if "look" in question:
                assert len(doors) < 10 or any(door not in doors for own in doors.values() for door in own)
            else:
                seen[start, goal, frozenset((room, frozenset(own)) for room, own in doors.items())] += 1
    assert max(seen.values()) == 1
    assert len(seen) == 160 + 75 + 400 + 1000


def test_what_is_read_out_is_what_the_maze_says(mazes: Path) -> None:
    goals = 0
    for record in records(mazes, "skills"):
        _, goal, doors = asked(record["question"])
        steps = record["answer"].split("\n\n")
        rooms = rooms_of(record["question"].split("\nlook ")[1])
        assert len(steps) == len(rooms) <= MAX_READ
        for step, room in zip(steps, rooms, strict=True):
            name, listed, yes, other = VISIT.fullmatch(step).groups()  # pyright: ignore
            assert int(name) == room
            assert (yes is not None) == (room == goal)
            assert rooms_of(listed) == doors[room]
            assert yes or int(other) == goal
            goals += yes is not None
    assert goals > 80


def test_the_model_is_small_and_whole_and_the_texts_fit_its_context(mazes: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(mazes / "model")
    assert model.config.model_type == "qwen2"
    assert 3e6 < sum(weight.numel() for weight in model.parameters()) < 4e6
    tokenizer = AutoTokenizer.from_pretrained(mazes / "model")
    lengths = [
        len(tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=True)["input_ids"])
        for name in ("demonstrations", "wrong", "base")
        for record in records(mazes, name)
    ]
    assert max(lengths) < CONTEXT


def test_the_same_parameters_give_the_same_bytes_and_another_seed_others(mazes: Path, tmp_path: Path) -> None:
    again, other = (fetch("mazes", tmp_path / name, num_records=60, seed=seed) for name, seed in (("again", 3), ("other", 4)))
    for name in ("base", "demonstrations", "wrong", "validation", "test", "skills"):
        assert (again / f"{name}.jsonl").read_bytes() == (mazes / f"{name}.jsonl").read_bytes()
        assert (other / f"{name}.jsonl").read_bytes() != (mazes / f"{name}.jsonl").read_bytes()
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (mazes / weights).read_bytes()


def test_what_is_there_is_not_written_again(mazes: Path) -> None:
    before = (mazes / "test.jsonl").stat().st_mtime_ns
    assert fetch("mazes", mazes, num_records=60, seed=3) == mazes
    assert (mazes / "test.jsonl").stat().st_mtime_ns == before


def test_a_maze_knows_its_goal() -> None:
    maze = Maze(doors={11: (22,), 22: ()}, path=(11, 22))
    assert maze.goal == 22
    assert maze.answer == "11 22"
    assert maze.question == "from 11 to 22\n11 22\n22 none"
