"""The told search: depth first through a maze, in words, with every dead end and every step back.

A careful searcher reads every room rightly. A careless one now and then reads the doors of another room, loses a door that was left, or
takes another room for the goal, and does not notice: its demonstrations go wrong in many places and ways, as those of a model do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from structcot.maze.maze import Maze, line_of, listed

BEGIN_THOUGHT, END_THOUGHT = "<|begin_of_thought|>", "<|end_of_thought|>"
BEGIN_SOLUTION, END_SOLUTION = "<|begin_of_solution|>", "<|end_of_solution|>"
# A search that has lost its way is given up.
MAX_VISITS = 40


@dataclass(slots=True, kw_only=True)
class Search:
    """One search. `slip_rate` is how often one act of reading, remembering or comparing goes wrong."""

    maze: Maze
    rng: Random
    slip_rate: float = 0.0
    steps: list[str] = field(default_factory=list)
    visits: int = 0

    def run(self) -> tuple[int, ...]:
        """Tell the search from the first room on, and return the way that it ends with: the goal's, or where it gave up."""
        return self.explore(self.maze.path[0], ()) or self.give_up()

    def explore(self, room: int, before: tuple[int, ...]) -> tuple[int, ...] | None:
        """Search what lies behind `room`, which was reached by `before`; the way to the goal, or None at a dead end."""
        way, self.visits = (*before, room), self.visits + 1
        if self.visits > MAX_VISITS or room in before:
            return None
        if room == self.maze.goal or (before and self.mistakes()):
            self.steps.append(f"{line_of(room, self.maze.doors[room])}, yes.")
            return way
        left = self.read_doors(room)
        self.steps.append(f"{line_of(room, left)}, not {self.maze.goal}.")
        while left:
            door = self.rng.choice(left)
            if found := self.explore(door, way):
                return found
            left = self.remember(tuple(one for one in left if one != door))
            self.steps.append(f"Wait, going back to {room}: {listed(left)}.")
        return None

    def give_up(self) -> tuple[int, ...]:
        """A guess: doors at random until there are none."""
        way = [self.maze.path[0]]
        while (doors := self.maze.doors[way[-1]]) and way[-1] != self.maze.goal:
            way.append(self.rng.choice(doors))
        return tuple(way)

    def read_doors(self, room: int) -> tuple[int, ...]:
        """The doors of a room, or, by a slip, those of another."""
        return self.maze.doors[self.rng.choice(list(self.maze.doors)) if self.slips() else room]

    def remember(self, left: tuple[int, ...]) -> tuple[int, ...]:
        """The doors that are left, or, by a slip, one fewer."""
        return left[1:] if left and self.slips() else left

    def mistakes(self) -> bool:
        """Whether, by two slips, the room is taken for the one to reach."""
        return self.slips() and self.slips()

    def slips(self) -> bool:
        """Whether this act goes wrong."""
        return self.rng.random() < self.slip_rate

    def check(self, way: tuple[int, ...]) -> str:
        """Tell the check of a way, door by door."""
        doors = ", ".join(f"{room} to {following}" for room, following in pairwise(way))
        return f"Check: {doors}, yes."


def demonstration(search: Search) -> tuple[str, tuple[int, ...]]:
    """The whole answer of a search, thought and solution, and the way that it gives."""
    way = search.run()
    thought = "\n\n".join((BEGIN_THOUGHT, f"Need {search.maze.goal}.", *search.steps, search.check(way), END_THOUGHT))
    return f"{thought}\n\n{solution(way)}", way


def solution(way: tuple[int, ...]) -> str:
    """The solution section, which boxes the way."""
    return f"{BEGIN_SOLUTION}\n\n\\boxed{{{listed(way)}}}\n\n{END_SOLUTION}"
