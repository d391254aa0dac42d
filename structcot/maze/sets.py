"""Everything that a study of mazes needs: a model, what it learns first, demonstrations, wrong ones, and problems to choose and to test by.

No maze is in two of the files, and rooms that are read out make no maze, so nothing that is tested was seen before. Record i of a file
depends on the seed, its file and what comes before it alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from structcot.files import replacing
from structcot.maze.maze import ROOM_NUMBERS, Maze, ask, draw_maze, line_of, listed
from structcot.maze.model import write_model
from structcot.maze.search import Search, demonstration, solution

NUM_VALIDATION, NUM_TEST, NUM_SKILLS, NUM_HELD_OUT = 400, 1000, 400, 100
# For each demonstration the model first sees this many mazes answered at once, and for each of these so many questions to read rooms out.
FIRST_PER_RECORD, READ_PER_FIRST = 1.25, 3
MAX_READ = 8
SHOWN_GOALS = 0.7
SLIP_RATE = 0.08


def write_mazes(directory: Path, *, num_records: int, seed: int) -> None:
    """Write the model and all files into an empty `directory`.

    model/               random weights, tokenizer
    base.jsonl           what the model is trained on first: answers without a thought, and rooms read out in no order
    demonstrations.jsonl `num_records` careful searches, and after them as many as are held out
    wrong.jsonl          a careless search of each of these mazes that ends in a wrong answer
    validation.jsonl, test.jsonl   mazes with their answers
    skills.jsonl         rooms to be read out, with what is right
    """
    write_model(directory / "model", seed)
    mazes = _distinct(seed)
    num_demonstrations = num_records + NUM_HELD_OUT
    searched = [next(mazes) for _ in range(num_demonstrations)]
    _write(directory / "demonstrations.jsonl", (_careful(maze, f"{seed}/{number}", number) for number, maze in enumerate(searched)))
    _write(directory / "wrong.jsonl", (_careless(maze, f"{seed}/{number}", number) for number, maze in enumerate(searched)))
    for name, count in (("validation", NUM_VALIDATION), ("test", NUM_TEST)):
        _write(directory / f"{name}.jsonl", (_problem(f"{name}-{number}", next(mazes)) for number in range(count)))
    rng = Random(f"mazes/{seed}/reading")
    _write(directory / "skills.jsonl", (_reading_problem(f"skills-{number}", rng) for number in range(NUM_SKILLS)))
    _write(directory / "base.jsonl", _first_records(mazes, round(FIRST_PER_RECORD * num_records), rng))


def reading(rng: Random) -> tuple[str, str]:
    """Ask for some rooms to be read out, one of them the goal more often than not: the question and the right answer.

    The rooms are drawn at random and make no maze. Most questions show but a few, with many doors: a model learns to look a room up from
    those within minutes, and from whole mazes, in which most rooms have no door or one, not within an hour.
    """
    few, some, many = rng.randint(2, 4), rng.randint(5, 9), rng.randint(10, 18)
    rooms = rng.sample(ROOM_NUMBERS, rng.choice((few, few, some, many)))
    doors = {room: tuple(rng.sample(ROOM_NUMBERS, rng.randint(0, 4))) for room in rooms}
    goal = rng.choice(rooms if rng.random() < SHOWN_GOALS else ROOM_NUMBERS)
    asked = rng.sample(rooms, min(MAX_READ, len(rooms)))
    read = [f"{line_of(room, doors[room])}, {'yes' if room == goal else f'not {goal}'}." for room in asked]
    return f"{ask(rng.choice(rooms), goal, doors)}\nlook {listed(tuple(asked))}", "\n\n".join(read)


def _distinct(seed: int) -> Iterator[Maze]:
    """Mazes of which no two ask the same, in whatever order their rooms are listed."""
    rng, seen = Random(f"mazes/{seed}"), set()
    while True:
        maze = draw_maze(rng)
        asked = (maze.path[0], maze.goal, frozenset((room, frozenset(doors)) for room, doors in maze.doors.items()))
        if asked not in seen:
            seen.add(asked)
            yield maze


def _careful(maze: Maze, key: str, number: int) -> dict[str, Any]:
    text, _ = demonstration(Search(maze=maze, rng=Random(f"mazes/search/{key}")))
    return _record(f"maze-{number:06d}", maze.question, text, gold=maze.answer, correct=True)


def _careless(maze: Maze, key: str, number: int) -> dict[str, Any]:
    rng = Random(f"mazes/slips/{key}")
    while True:
        text, way = demonstration(Search(maze=maze, rng=rng, slip_rate=SLIP_RATE))
        if way != maze.path:
            return _record(f"maze-{number:06d}", maze.question, text, gold=maze.answer, correct=False)


def _first_records(mazes: Iterator[Maze], num_each: int, rng: Random) -> Iterator[dict[str, Any]]:
    for number in range(num_each):
        maze = next(mazes)
        yield _record(f"direct-{number:06d}", maze.question, solution(maze.path))
        for part in range(READ_PER_FIRST):
            yield _record(f"reading-{number:06d}-{part}", *reading(rng))


def _problem(name: str, maze: Maze) -> dict[str, Any]:
    return {"id": name, "question": maze.question, "answer": maze.answer}


def _reading_problem(name: str, rng: Random) -> dict[str, Any]:
    question, answer = reading(rng)
    return {"id": name, "question": question, "answer": answer}


def _record(name: str, question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with replacing(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
