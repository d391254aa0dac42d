"""Mazes: rooms with doors to further rooms, one way from the first to the goal, and dead ends beside it.

To find the way one has to try a door, see where it leads, notice a dead end, go back, remember what is left, and check what was found.
Everything that a step needs to know stands in the question (which doors a room has, whether it is the goal), so the content of a step is a
matter of reading, and the order of the steps is what has to be learned. The question lists rooms in random order and the search picks doors
at random, so no order can be known by heart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random

# Two digits each, so that a number with another digit is another number; few enough that a small model soon knows them apart.
ROOM_NUMBERS = range(10, 34)
PATH_DOORS = 5
# Dead ends that open from each room of the way; the last rooms of the way have none, so that the goal is not told by its neighbours.
DEAD_ENDS = (2, 1, 1, 1)
FORK_SHARE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Maze:
    """`doors` of each room, in the order in which the question lists them; `path` is the only way from the first room to the goal."""

    doors: Mapping[int, tuple[int, ...]]
    path: tuple[int, ...]

    @property
    def goal(self) -> int:
        """The room to reach."""
        return self.path[-1]

    @property
    def question(self) -> str:
        """The maze and what to find in it."""
        return ask(self.path[0], self.goal, self.doors)

    @property
    def answer(self) -> str:
        """The rooms of the way."""
        return " ".join(map(str, self.path))


def ask(start: int, goal: int, doors: Mapping[int, tuple[int, ...]]) -> str:
    """Ask for the way from one room to another; each line is a room and its doors."""
    return "\n".join([f"from {start} to {goal}", *(line_of(room, own) for room, own in doors.items())])


def line_of(room: int, doors: tuple[int, ...]) -> str:
    """A room and its doors, as the question and the search write them alike."""
    return f"{room} {listed(doors)}"


def listed(rooms: tuple[int, ...]) -> str:
    """Rooms as a step names them."""
    return " ".join(map(str, rooms)) or "none"


def draw_maze(rng: Random) -> Maze:
    """Draw a maze: a way of `PATH_DOORS` doors, and dead ends of two rooms in a row, some with a fork."""
    numbers = iter(rng.sample(ROOM_NUMBERS, len(ROOM_NUMBERS)))
    path = tuple(next(numbers) for _ in range(PATH_DOORS + 1))
    doors: dict[int, list[int]] = {room: [following] for room, following in pairwise(path)} | {path[-1]: []}
    for room, count in zip(path, DEAD_ENDS, strict=False):
        for _ in range(count):
            entrance, ends = next(numbers), [next(numbers) for _ in range(1 + (rng.random() < FORK_SHARE))]
            doors[room].append(entrance)
            doors |= {entrance: ends} | {end: [] for end in ends}
    rooms = rng.sample(list(doors), len(doors))
    return Maze(doors={room: tuple(rng.sample(doors[room], len(doors[room]))) for room in rooms}, path=path)


def draw_mazes(rng: Random) -> Iterator[Maze]:
    """Draw mazes for ever."""
    while True:
        yield draw_maze(rng)
