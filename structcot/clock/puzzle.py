"""Clock puzzles: join three numbers by two operations so that, on a clock of `HOURS` hours, they make a target.

Two of the numbers are joined first, in any of three operations, and what they make is joined with the third: 27 ways, of which exactly one
is right. So an answer is judged by comparing text, and guessing finds it once in 27 times. What a step needs to know is small and closed,
the sums, differences and products of the hours; in which order steps are taken has to be learned from demonstrations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product

# A prime: a product of hours other than 0 is never 0.
HOURS = 19
OPERATORS = ("+", "-", "*")
# 0 and 1 change little or nothing.
NUMBERS = range(2, HOURS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to use all numbers, written `first operator second operator third` and worked out from left to right."""

    numbers: tuple[int, int, int]
    operators: tuple[str, str]

    @property
    def text(self) -> str:
        """The way as an answer gives it."""
        (first, second, third), (one, other) = self.numbers, self.operators
        return f"{first} {one} {second} {other} {third}"

    @property
    def value(self) -> int:
        """What it makes."""
        (first, second, third), (one, other) = self.numbers, self.operators
        return work_out(work_out(first, one, second), other, third)


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """Three distinct numbers, what they must make, and the only way that makes it."""

    numbers: tuple[int, int, int]
    target: int
    way: Way

    @property
    def question(self) -> str:
        """The puzzle as it is asked."""
        return f"make {self.target} from {' '.join(map(str, self.numbers))}"


def work_out(left: int, operator: str, right: int) -> int:
    """One operation on the clock."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % HOURS


def pairs_of(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """The two numbers that are joined first, in the order in which they are given, and the one that is left; three of them."""
    return [(numbers[i], numbers[j], numbers[3 - i - j]) for i, j in combinations(range(3), 2)]


def ways_of(numbers: Sequence[int]) -> list[Way]:
    """All 27 ways."""
    return [Way(numbers=order, operators=(one, other)) for order in pairs_of(numbers) for one, other in product(OPERATORS, repeat=2)]


def all_puzzles() -> Iterator[Puzzle]:
    """Every puzzle: all ordered numbers, with each target that exactly one way makes."""
    for numbers in permutations(NUMBERS, 3):
        ways = ways_of(numbers)
        counts = Counter(way.value for way in ways)
        yield from (Puzzle(numbers=numbers, target=way.value, way=way) for way in ways if counts[way.value] == 1 and way.value in NUMBERS)
