"""Countdown demonstrations, written by a program that really searches.

A problem gives some numbers and a target; a solution is an expression of +, -, *, / and parentheses that uses every number exactly once
and equals the target. The search is depth first: join two numbers by an operation that has something to say for it, go on with what is
left, and go back where nothing reaches the target. It keeps to positive whole numbers, as people do; the rules allow fractions too.
What the search does is told while it happens, so a demonstration holds its real dead ends and nothing else: propose, compute, compare,
backtrack with the reason, check, conclude. Every equation in it is true; `verify` proves that with an evaluator of its own.

Source of the idea: Gandhi et al., "Stream of Search", 2024 (arXiv 2404.03683). The record format is that of the Sky-T1 release.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import structcot.countdown_words as words
from structcot.countdown_check import verify
from structcot.errors import ConfigError

MIN_NUMBERS, MAX_NUMBERS = 3, 6
# A search that misses is told again in another order a few times before the problem itself is given up.
ORDERS_PER_PROBLEM = 4
DRAWS_PER_RECORD = 2000
# A demonstration that never fails teaches no search, but some problems are easy: of those solved at once this share is kept.
DIRECT_SHARE = 0.1
# Below the first level a person tries a few continuations, not all of them.
MAX_BRANCHES = 3
# Results far above the target are hardly ever brought down again.
MAX_OVERSHOOT = 10
MAX_FINAL_OVERSHOOT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """How hard the problems are and how long their searches. A step is one operation tried."""

    min_numbers: int = 3
    max_numbers: int = 4
    max_number: int = 12
    max_target: int = 60
    min_steps: int = 4
    max_steps: int = 6


DIFFICULTIES = {
    "easy": Difficulty(),
    "medium": Difficulty(min_numbers=4, max_numbers=5, max_number=50, max_target=200, min_steps=12, max_steps=60),
    "hard": Difficulty(min_numbers=6, max_numbers=6, max_number=100, max_target=999, min_steps=40, max_steps=400),
}


@dataclass(frozen=True, slots=True)
class Item:
    """A number on the table: its value and the expression that made it; `operator` is "" for a given number."""

    value: int
    text: str
    operator: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One operation on two items."""

    left: Item
    right: Item
    result: Item

    @property
    def value(self) -> int:
        """What the operation gives."""
        return self.result.value

    @property
    def operation(self) -> str:
        """The operation as it is written, such as `7 * 5`."""
        return f"{self.left.value} {self.result.operator} {self.right.value}"

    @property
    def equation(self) -> str:
        """The operation and what it gives, such as `7 * 5 = 35`."""
        return f"{self.operation} = {self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One told search: its aim, and what it has tried, given up and written so far."""

    target: int
    max_steps: int
    rng: random.Random
    lines: list[str] = field(default_factory=list)
    tried: list[Move] = field(default_factory=list)
    failed: list[Move] = field(default_factory=list)
    seen: set[tuple[int, ...]] = field(default_factory=set)


def make_demonstrations(*, num_records: int, seed: int, difficulty: Difficulty = DIFFICULTIES["easy"]) -> Iterator[dict[str, Any]]:
    """Yield `num_records` records, no problem twice; record i depends only on `seed`, i and the problems before it.

    Raises:
        ConfigError: if the difficulty makes no sense, or has fewer distinct problems than records are asked for.
    """
    _check_difficulty(difficulty, num_records)
    return _generate(num_records, seed, difficulty)


def write_countdown(path: Path, *, num_records: int, seed: int, difficulty: Difficulty = DIFFICULTIES["easy"]) -> None:
    """Write verified records as JSON lines; `path` appears complete or not at all.

    Raises:
        ConfigError: as `make_demonstrations`.
        DataError: if a record fails `verify`.
    """
    records = make_demonstrations(num_records=num_records, seed=seed, difficulty=difficulty)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for record in records:
                verify(record)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_difficulty(difficulty: Difficulty, num_records: int) -> None:
    low, high = difficulty.min_numbers, difficulty.max_numbers
    if not MIN_NUMBERS <= low <= high <= MAX_NUMBERS:
        raise ConfigError(f"countdown: got {low} to {high} numbers; use a range within {MIN_NUMBERS} to {MAX_NUMBERS}")
    if difficulty.max_number < 1 or difficulty.max_target < 1:
        raise ConfigError(f"countdown: got max_number {difficulty.max_number} and max_target {difficulty.max_target}; use at least 1")
    if difficulty.min_steps > difficulty.max_steps or difficulty.max_steps < high - 1:
        asked = f"min_steps {difficulty.min_steps} and max_steps {difficulty.max_steps}"
        raise ConfigError(f"countdown: got {asked}; {high} numbers take at least {high - 1} steps, and min_steps may not exceed max_steps")
    if num_records < 0:
        raise ConfigError(f"countdown: got num_records {num_records}; use 0 or more")
    num_problems = difficulty.max_target * sum(comb(difficulty.max_number + n - 1, n) for n in range(low, high + 1))
    if num_records > num_problems:
        raise ConfigError(
            f"countdown: {num_records} records asked for, but this difficulty has at most {num_problems} distinct problems; "
            "ask for fewer or raise max_number, max_target or max_numbers"
        )


def _generate(num_records: int, seed: int, difficulty: Difficulty) -> Iterator[dict[str, Any]]:
    seen: set[tuple[int, ...]] = set()
    for index in range(num_records):
        rng = random.Random(f"countdown/{seed}/{index}")
        for _ in range(DRAWS_PER_RECORD):
            numbers, target = _draw_problem(rng, difficulty)
            key = (*sorted(numbers), target)
            if key in seen or not 1 <= target <= difficulty.max_target:
                continue
            if solved := _solve(numbers, target, rng, difficulty):
                break
        else:
            raise ConfigError(
                f"countdown: {index} of {num_records} records found, then {DRAWS_PER_RECORD} problems drawn in a row were known already "
                "or not solved within the steps allowed; this difficulty has not enough distinct problems: ask for fewer, raise "
                "max_number, max_target or max_numbers, or widen min_steps to max_steps"
            )
        seen.add(key)
        yield _record(f"countdown-{index:06d}", numbers, *solved)


def _draw_problem(rng: random.Random, difficulty: Difficulty) -> tuple[list[int], int]:
    """Draw numbers, and as target what a random legal computation makes of them, so that a solution exists."""
    count = rng.randint(difficulty.min_numbers, difficulty.max_numbers)
    numbers = [rng.randint(1, difficulty.max_number) for _ in range(count)]
    items = [Item(number, str(number)) for number in numbers]
    while len(items) > 1:
        left, right = rng.sample(range(len(items)), 2)
        results = [move.result for move in _moves(items[left], items[right])]
        items = [item for i, item in enumerate(items) if i not in (left, right)] + [rng.choice(results)]
    return numbers, items[0].value


def _solve(numbers: Sequence[int], target: int, rng: random.Random, difficulty: Difficulty) -> tuple[Search, tuple[Move, ...]] | None:
    items = [Item(number, str(number)) for number in numbers]
    for _ in range(ORDERS_PER_PROBLEM):
        search = Search(target=target, max_steps=difficulty.max_steps, rng=rng)
        moves = _explore(search, items, ())
        if not moves or not difficulty.min_steps <= len(search.tried) <= difficulty.max_steps:
            continue
        if search.failed or rng.random() < DIRECT_SHARE:
            return search, moves
    return None


def _explore(search: Search, items: Sequence[Item], path: tuple[Move, ...]) -> tuple[Move, ...] | None:
    """Search depth first below `items`, telling it in `search.lines`; None at a dead end or when the steps are used up."""
    if len(items) == 2:
        return _finish(search, items, path)
    failed: Move | None = None
    for move, reason, rest in _ranked_moves(search, items, is_first=not path):
        if len(search.tried) >= search.max_steps:
            return None
        left = [*rest, move.result]
        facts = {"target": search.target, "left": _listed(left)}
        if failed is None:
            search.lines.append(words.propose(search.rng, move, reason, **facts, is_first=not path))
        else:
            search.lines.append(words.retry(search.rng, move, reason, **facts, failed=failed.operation, to=_listed(items)))
        search.tried.append(move)
        search.seen.add(_state(left))
        found = _explore(search, left, (*path, move))
        if found is not None:
            return found
        failed = move
        search.failed.append(move)
    return None


def _finish(search: Search, items: Sequence[Item], path: tuple[Move, ...]) -> tuple[Move, ...] | None:
    """Try the operations on the last two numbers until one hits the target, and say what came out."""
    moves = _moves(items[0], items[1])
    # Nobody works out 44 * 19 to reach 34. The smallest result stays, so that there is always something to compare.
    bound = max(MAX_FINAL_OVERSHOOT * search.target, min(move.value for move in moves))
    moves = [move for move in moves if move.value <= bound]
    search.rng.shuffle(moves)
    hit = next((i for i, move in enumerate(moves) if move.value == search.target), None)
    shown = moves if hit is None else moves[: hit + 1]
    search.tried.extend(shown)
    search.lines.append((words.miss if hit is None else words.hit)(search.rng, shown, search.target))
    return None if hit is None else (*path, moves[hit])


def _ranked_moves(search: Search, items: Sequence[Item], *, is_first: bool) -> list[tuple[Move, str, list[Item]]]:
    """Operations worth trying, best first by a rough human judgement with some chance in it; each with its reason and what it leaves."""
    ranked: list[tuple[float, Move, str, list[Item]]] = []
    states = set(search.seen)
    for i, j in combinations(range(len(items)), 2):
        rest = [item for k, item in enumerate(items) if k not in (i, j)]
        for move in _moves(items[i], items[j]):
            state = _state([*rest, move.result])
            if state in states or move.value > MAX_OVERSHOOT * search.target:
                continue
            states.add(state)
            score, reason = _judge(move, search.target, rest)
            ranked.append((score + search.rng.uniform(0, 3), move, reason, rest))
    ranked.sort(key=lambda entry: -entry[0])
    return [entry[1:] for entry in ranked[: None if is_first else MAX_BRANCHES]]


def _judge(move: Move, target: int, rest: Sequence[Item]) -> tuple[float, str]:
    """Return how promising a move looks and the reason, which is one of `words.REASONS` and true of the move."""
    value = move.value
    if 1 < value < target and target % value == 0:
        return 2.0, "divides"
    if value != target and abs(value - target) <= max(1, target // 5):
        return 1.5, "near"
    if move.result.operator == "*" and sum(item.value for item in (move.left, move.right, *rest)) < target:
        return 1.0, "product"
    if move.result.operator in "-/" and value < min(move.left.value, move.right.value):
        return 0.5, "small"
    return 0.0, "plain"


def _moves(a: Item, b: Item) -> list[Move]:
    """List the operations on two numbers that give a positive whole number."""
    high, low = (a, b) if a.value >= b.value else (b, a)
    results = {"+": high.value + low.value, "*": high.value * low.value}
    if high.value > low.value:
        results["-"] = high.value - low.value
    if high.value % low.value == 0:
        results["/"] = high.value // low.value
    return [Move(left=high, right=low, result=Item(value, _joined(high, low, operator), operator)) for operator, value in results.items()]


def _joined(left: Item, right: Item, operator: str) -> str:
    """Write `left operator right` with the fewest parentheses that keep its meaning."""
    left_text = f"({left.text})" if operator in "*/" and left.operator in ("+", "-") else left.text
    tighter = {"+": (), "-": ("+", "-"), "*": ("+", "-"), "/": ("+", "-", "*", "/")}[operator]
    right_text = f"({right.text})" if right.operator in tighter else right.text
    return f"{left_text} {operator} {right_text}"


def _state(items: Sequence[Item]) -> tuple[int, ...]:
    return tuple(sorted(item.value for item in items))


def _listed(items: Sequence[Item]) -> str:
    return ", ".join(str(item.value) for item in items)


def _record(record_id: str, numbers: Sequence[int], search: Search, moves: Sequence[Move]) -> dict[str, Any]:
    listed, answer, rng = ", ".join(map(str, numbers)), moves[-1].result.text, search.rng
    question = words.question(rng, listed, search.target)
    steps = [words.opening(rng, listed, search.target), *search.lines, words.checking(rng, answer, listed, search.target)]
    thought = "\n\n".join((words.BEGIN_THOUGHT, *steps, words.END_THOUGHT))
    solution = "\n\n".join((words.BEGIN_SOLUTION, words.solution(rng, moves, answer, search.target), words.END_SOLUTION))
    return {
        "id": record_id,
        "system": words.SYSTEM,
        "conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": f"{thought}\n\n{solution}"}],
        "numbers": list(numbers),
        "target": search.target,
        "answer": answer,
    }
