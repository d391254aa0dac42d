"""Everything that a study of clock puzzles needs: a model, what it learns first, demonstrations right and wrong, and problems.

Which numbers are learned from and which are tested is decided by the numbers themselves, in whatever order they stand, so nothing that is
tested was seen before in any form. Record i of a file depends on the seed, its file and what comes before it alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from structcot.clock.model import write_model
from structcot.clock.puzzle import HOURS, NUMBERS, OPERATORS, Puzzle, all_puzzles, work_out
from structcot.clock.search import Search, comparison, demonstration, equation, solution
from structcot.errors import ConfigError
from structcot.files import replacing

NUM_VALIDATION, NUM_TEST, NUM_SKILLS, NUM_HELD_OUT = 400, 1000, 400, 100
# Shares of all sets of three numbers that are kept for each purpose; the rest is for training.
VALIDATION_SHARE, TEST_SHARE = 0.04, 0.10
# For each demonstration the model first sees this many puzzles answered at once, and for each of these so many rows of operations.
FIRST_PER_RECORD, ROWS_PER_FIRST = 0.75, 2
OPERATIONS = [(left, operator, right) for left in range(HOURS) for operator in OPERATORS for right in NUMBERS]
OPERATIONS_PER_ROW = 8
# How often an operation is chosen to make the number that the row compares with, where chance would do so once in HOURS.
HIT_SHARE = 0.2
SLIP_RATE = 0.1


def write_clock(directory: Path, *, num_records: int, seed: int) -> None:
    """Write the model and all files into an empty `directory`.

    model/               random weights, tokenizer
    base.jsonl           what the model is trained on first: answers without a thought, and operations worked out and compared, in no order
    demonstrations.jsonl `num_records` careful searches, and after them as many as are held out
    wrong.jsonl          a careless search of each of these puzzles that ends in a wrong answer
    validation.jsonl, test.jsonl   puzzles with their answers
    skills.jsonl         operations to be worked out, with what is right

    Raises:
        ConfigError: if there are not so many different puzzles.
    """
    write_model(directory / "model", seed)
    rng = Random(f"clock/{seed}")
    num_searched, num_first = num_records + NUM_HELD_OUT, round(FIRST_PER_RECORD * num_records)
    puzzles: dict[str, list[Puzzle]] = defaultdict(list)
    for puzzle in all_puzzles():
        puzzles[purpose_of(puzzle.numbers)].append(puzzle)
    training = _drawn(rng, puzzles, "training", num_searched + num_first)
    searched, answered = training[:num_searched], training[num_searched:]
    _write(directory / "demonstrations.jsonl", (_careful(puzzle, f"{seed}/{number}", number) for number, puzzle in enumerate(searched)))
    _write(directory / "wrong.jsonl", (_careless(puzzle, f"{seed}/{number}", number) for number, puzzle in enumerate(searched)))
    for name, count in (("validation", NUM_VALIDATION), ("test", NUM_TEST)):
        problems = _drawn(rng, puzzles, name, count)
        _write(directory / f"{name}.jsonl", (_problem(f"{name}-{number}", puzzle) for number, puzzle in enumerate(problems)))
    _write(directory / "skills.jsonl", (_operations_problem(f"skills-{number}", rng) for number in range(NUM_SKILLS)))
    _write(directory / "base.jsonl", _first_records(answered, rng))


def purpose_of(numbers: Iterable[int]) -> str:
    """What three numbers are for, in whatever order: "training", "validation" or "test"."""
    digest = hashlib.blake2b(" ".join(map(str, sorted(numbers))).encode(), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64
    return "validation" if place < VALIDATION_SHARE else "test" if place < VALIDATION_SHARE + TEST_SHARE else "training"


def operations(rng: Random) -> tuple[str, str]:
    """Ask for some operations to be worked out and compared with a number: the question and the right answer."""
    need = rng.choice(NUMBERS)
    asked = [rng.choice(_making(need) if rng.random() < HIT_SHARE else OPERATIONS) for _ in range(OPERATIONS_PER_ROW)]
    question = f"need {need}: {', '.join(f'{left} {operator} {right}' for left, operator, right in asked)}"
    return question, "\n\n".join(_worked_out(*one, need) for one in asked)


def _worked_out(left: int, operator: str, right: int, need: int) -> str:
    """An operation and how far what it makes is from the number that is needed, as a search tells them."""
    value = work_out(left, operator, right)
    return f"{equation(left, operator, right, value)}, {comparison(value, need, work_out(value, '-', need))}."


@cache
def _making(need: int) -> list[tuple[int, str, int]]:
    """All operations that make a number."""
    return [one for one in OPERATIONS if work_out(*one) == need]


def _drawn(rng: Random, puzzles: Mapping[str, Sequence[Puzzle]], purpose: str, count: int) -> list[Puzzle]:
    """So many of the puzzles for a purpose, drawn without replacement.

    Raises:
        ConfigError: if there are fewer.
    """
    own = puzzles[purpose]
    if count > len(own):
        raise ConfigError(f"clock: for {purpose} {count:,} puzzles are needed and there are {len(own):,}; ask for fewer records")
    return rng.sample(own, count)


def _careful(puzzle: Puzzle, key: str, number: int) -> dict[str, Any]:
    text, _ = demonstration(Search(puzzle=puzzle, rng=Random(f"clock/search/{key}")))
    return _record(f"clock-{number:06d}", puzzle.question, text, gold=puzzle.way.text, correct=True)


def _careless(puzzle: Puzzle, key: str, number: int) -> dict[str, Any]:
    rng = Random(f"clock/slips/{key}")
    while True:
        text, way = demonstration(Search(puzzle=puzzle, rng=rng, slip_rate=SLIP_RATE))
        if way != puzzle.way:
            return _record(f"clock-{number:06d}", puzzle.question, text, gold=puzzle.way.text, correct=False)


def _first_records(puzzles: Iterable[Puzzle], rng: Random) -> Iterator[dict[str, Any]]:
    for number, puzzle in enumerate(puzzles):
        yield _record(f"direct-{number:06d}", puzzle.question, solution(puzzle.way))
        for part in range(ROWS_PER_FIRST):
            yield _record(f"operations-{number:06d}-{part}", *operations(rng))


def _problem(name: str, puzzle: Puzzle) -> dict[str, Any]:
    return {"id": name, "question": puzzle.question, "answer": puzzle.way.text}


def _operations_problem(name: str, rng: Random) -> dict[str, Any]:
    question, answer = operations(rng)
    return {"id": name, "question": question, "answer": answer}


def _record(name: str, question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with replacing(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
