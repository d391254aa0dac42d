"""Which step of one thought is which step of another: kept, moved, changed, deleted or inserted.

Steps are the same where their texts are, white space at either end aside. The longest row of same steps in the same order is kept; other
same steps have moved. Of what is left, a deleted and an inserted step between the same two kept ones that share most of their words are
one step that was changed; numbers count as one word there, since a perturbation of the digits leaves the sentence as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kept", "moved", "changed", "deleted", "inserted"]

# More pairs of equal texts than this come from a thought that loops; its steps are then paired first with first, second with second.
MAX_PAIRS = 100_000
# Share of words in common, 2 |a & b| / (|a| + |b|) as in Dice's coefficient, from which two steps are one that was changed.
MIN_SHARED = 0.5
# How many of the inserted steps a deleted one is compared with, so that the time taken grows with the number of steps and no faster.
NUM_CANDIDATES = 8

_WORD = re.compile(r"[0-9]+|[A-Za-z]+|\w")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What became of a step: `here` is its number in the one thought, `there` in the other; a deleted or inserted step has one of them."""

    kind: Kind
    here: int | None
    there: int | None


def match_steps(here: Sequence[str], there: Sequence[str]) -> list[Link]:
    """Match the texts of the steps of two thoughts; every step of either is in one link. In the order of `here`, inserted ones last."""
    here, there = [text.strip() for text in here], [text.strip() for text in there]
    kept = _kept(here, there)
    partners: dict[int, tuple[Kind, int]] = {left: ("kept", right) for left, right in kept}
    taken = {right for _, right in kept}
    for left, right in _same(here, there, partners, taken):
        partners[left] = ("moved", right)
        taken.add(right)
    for left, right in _changed(here, there, kept, (partners, taken)):
        partners[left] = ("changed", right)
        taken.add(right)
    links = []
    for left in range(len(here)):
        kind, right = partners.get(left, ("deleted", None))
        links.append(Link(kind=kind, here=left, there=right))
    return links + [Link(kind="inserted", here=None, there=right) for right in range(len(there)) if right not in taken]


def _kept(here: Sequence[str], there: Sequence[str]) -> list[tuple[int, int]]:
    """Find the longest row of pairs of equal texts that goes up on both sides (Hunt and Szymanski, 1977).

    Pairs in the order of `here`, and against the order of `there` for one step of `here`: then the longest rising row of second numbers
    uses each step once.
    """
    shorter = min(len(here), len(there))
    start = next((index for index in range(shorter) if here[index] != there[index]), shorter)
    end = next((index for index in range(shorter - start) if here[-1 - index] != there[-1 - index]), shorter - start)
    places: dict[str, list[int]] = defaultdict(list)
    for right in range(start, len(there) - end):
        places[there[right]].append(right)
    inner = range(start, len(here) - end)
    if sum(len(places.get(here[left], ())) for left in inner) <= MAX_PAIRS:
        pairs = [(left, right) for left in inner for right in reversed(places.get(here[left], ()))]
    else:
        pairs = _same(here, there, set(range(start)) | set(range(inner.stop, len(here))), set(range(start)))
        pairs = [(left, right) for left, right in pairs if right < len(there) - end]
    before = [(index, index) for index in range(start)]
    after = [(len(here) - index, len(there) - index) for index in range(end, 0, -1)]
    return before + _longest_rising(pairs) + after


def _longest_rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Choose as many of `pairs` as have rising second numbers, in time n log n."""
    lasts: list[int] = []
    ends: list[int] = []
    previous: list[int] = []
    for number, (_, right) in enumerate(pairs):
        length = bisect_left(lasts, right)
        previous.append(ends[length - 1] if length else -1)
        lasts[length : length + 1] = [right]
        ends[length : length + 1] = [number]
    chosen, number = [], ends[-1] if ends else -1
    while number >= 0:
        chosen.append(pairs[number])
        number = previous[number]
    return chosen[::-1]


def _same(
    here: Sequence[str], there: Sequence[str], done: dict[int, tuple[Kind, int]] | set[int], taken: set[int]
) -> list[tuple[int, int]]:
    """Pair the steps of equal text that have no partner yet, the first with the first."""
    places: dict[str, deque[int]] = defaultdict(deque)
    for right, text in enumerate(there):
        if right not in taken:
            places[text].append(right)
    return [(left, places[text].popleft()) for left, text in enumerate(here) if left not in done and places.get(text)]


def _changed(
    here: Sequence[str],
    there: Sequence[str],
    kept: Sequence[tuple[int, int]],
    found: tuple[dict[int, tuple[Kind, int]], set[int]],
) -> list[tuple[int, int]]:
    """Pair what is left between two kept steps where the words are mostly the same; the pairs of one gap do not cross."""
    partners, taken = found
    pairs = []
    last_left, last_right = 0, 0
    for next_left, next_right in [*kept, (len(here), len(there))]:
        deleted = [left for left in range(last_left, next_left) if left not in partners]
        inserted = [right for right in range(last_right, next_right) if right not in taken]
        if deleted and inserted:
            pairs += _similar([(left, _words(here[left])) for left in deleted], [(right, _words(there[right])) for right in inserted])
        last_left, last_right = next_left, next_right
    return pairs


def _similar(deleted: Sequence[tuple[int, Counter[str]]], inserted: Sequence[tuple[int, Counter[str]]]) -> list[tuple[int, int]]:
    """Give each deleted step the most similar of the next inserted ones, if that is similar enough."""
    pairs, first = [], 0
    for left, words in deleted:
        scores = [_shared(words, others) for _, others in inserted[first : first + NUM_CANDIDATES]]
        if scores and max(scores) >= MIN_SHARED:
            first += scores.index(max(scores))
            pairs.append((left, inserted[first][0]))
            first += 1
    return pairs


def _words(text: str) -> Counter[str]:
    """Count the words of a text; every number is the word 0, and a sign of a script without spaces is a word."""
    return Counter("0" if word[0].isdigit() else word.lower() for word in _WORD.findall(text))


def _shared(one: Counter[str], other: Counter[str]) -> float:
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 0.0
