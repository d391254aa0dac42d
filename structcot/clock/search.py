"""The told search: all ways that a puzzle has, one after another, with every dead end and every step back.

Each search draws an order of the pairs and one of the operations and keeps to them, so that no order is learned by heart, and what was
tried already can be told from what is written.

A careful searcher works out every operation rightly. A careless one now and then gets another hour, as a person or a model does, and does
not notice: where the slip falls decides whether the way is passed over, or a wrong one seems right, and the search goes wrong accordingly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from random import Random

from structcot.clock.puzzle import HOURS, OPERATORS, Puzzle, Way, pairs_of, ways_of, work_out
from structcot.tags import SOLUTION_TAGS, THOUGHT_TAGS

(BEGIN_THOUGHT, END_THOUGHT), (BEGIN_SOLUTION, END_SOLUTION) = THOUGHT_TAGS[0], SOLUTION_TAGS


@dataclass(slots=True, kw_only=True)
class Search:
    """One search. `slip_rate` is how often an operation goes wrong; one that comes again goes as it went before."""

    puzzle: Puzzle
    rng: Random
    slip_rate: float = 0.0
    steps: list[str] = field(default_factory=list)
    results: dict[tuple[int, str, int], int] = field(default_factory=dict)

    def run(self) -> Way:
        """Tell the search, and return the way that it ends with: the one that seems right, or a guess where none does."""
        pairs = self.rng.sample(pairs_of(self.puzzle.numbers), 3)
        operators = self.rng.sample(OPERATORS, len(OPERATORS))
        for number, ((first, second, third), one) in enumerate(product(pairs, operators)):
            self.steps += ["Wait, going back."] if number else []
            self.steps.append(f"{self.told(first, one, second)}, left {third}.")
            for other in operators:
                value = self.result(first, one, second)
                made = self.result(value, other, third)
                self.steps.append(f"{equation(value, other, third, made)}, {self.compare(made)}.")
                if self.result(made, "-", self.puzzle.target) == 0:
                    return Way(numbers=(first, second, third), operators=(one, other))
        return self.rng.choice(ways_of(self.puzzle.numbers))

    def result(self, left: int, operator: str, right: int) -> int:
        """Work out one operation, or get it wrong."""
        key = (left, operator, right)
        if key not in self.results:
            true = work_out(*key)
            slips = self.rng.random() < self.slip_rate
            self.results[key] = self.rng.choice([hour for hour in range(HOURS) if hour != true]) if slips else true
        return self.results[key]

    def told(self, left: int, operator: str, right: int) -> str:
        """One operation with its result."""
        return equation(left, operator, right, self.result(left, operator, right))

    def compare(self, value: int) -> str:
        """A value compared with the target, rightly or not."""
        return comparison(value, self.puzzle.target, self.result(value, "-", self.puzzle.target))

    def check(self, way: Way) -> str:
        """Tell the check of a way."""
        (first, second, third), (one, other) = way.numbers, way.operators
        value = self.result(first, one, second)
        made = self.result(value, other, third)
        return f"Check: {equation(first, one, second, value)}, {equation(value, other, third, made)}, {self.compare(made)}."


def equation(left: int, operator: str, right: int, result: int) -> str:
    """An operation with what came of it."""
    return f"{left} {operator} {right} = {result}"


def comparison(value: int, target: int, between: int) -> str:
    """How a value is compared with a target: by what is between them, and "yes" where that is nothing."""
    return equation(value, "-", target, between) + ("" if between else ", yes")


def demonstration(search: Search) -> tuple[str, Way]:
    """The whole answer of a search, thought and solution, and the way that it gives."""
    way = search.run()
    thought = "\n\n".join((BEGIN_THOUGHT, f"Need {search.puzzle.target}.", *search.steps, search.check(way), END_THOUGHT))
    return f"{thought}\n\n{solution(way)}", way


def solution(way: Way) -> str:
    """The solution section, which boxes the way."""
    return f"{BEGIN_SOLUTION}\n\n\\boxed{{{way.text}}}\n\n{END_SOLUTION}"
