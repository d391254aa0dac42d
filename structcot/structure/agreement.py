"""How far two ways to cut one text into steps agree.

A boundary is where a step ends and the next begins; the start and the end of the text are none. White space at a cut belongs to neither
step: cuts that differ by white space alone are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from structcot.structure.segmenters import Step

_NO_SPACE = re.compile(r"\S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Steps A held against steps B of the same text, which are taken for right.

    `boundaries_a` and `boundaries_b` count boundaries, `shared` those at the same place. `precision` is the share of A's that B has,
    `recall` the share of B's that A has, each 1 where there are none to share; `f1` is their harmonic mean. `window_diff` is 0 where all
    boundaries agree, and at most 1; it forgives a boundary that is close to its like.
    """

    boundaries_a: int
    boundaries_b: int
    shared: int
    precision: float
    recall: float
    f1: float
    window_diff: float

    def facts(self) -> dict[str, float]:
        """Give all fields by name, ready for JSON."""
        return asdict(self)


def agreement(text: str, steps_a: Sequence[Step], steps_b: Sequence[Step]) -> Agreement:
    """Compare two segmentations of `text`; both have their steps in order and without gaps, with offsets into it."""
    cuts_a, cuts_b = boundaries(text, steps_a), boundaries(text, steps_b)
    shared = len(set(cuts_a) & set(cuts_b))
    precision = shared / len(cuts_a) if cuts_a else 1.0
    recall = shared / len(cuts_b) if cuts_b else 1.0
    return Agreement(
        boundaries_a=len(cuts_a),
        boundaries_b=len(cuts_b),
        shared=shared,
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if shared or not (cuts_a or cuts_b) else 0.0,
        window_diff=window_diff(cuts_a, cuts_b, len(text)),
    )


def boundaries(text: str, steps: Sequence[Step]) -> list[int]:
    """Find where steps begin, in order: offsets of the first character that is not white space, without that of the first step."""
    found: list[int] = []
    first = _NO_SPACE.search(text)
    place = first.start() if first else len(text)
    for step in steps[1:]:
        if step.start > place:
            match = _NO_SPACE.search(text, step.start)
            place = match.start() if match else len(text)
            if match:
                found.append(place)
    return found


def window_diff(cuts_a: Sequence[int], cuts_b: Sequence[int], length: int) -> float:
    """WindowDiff (Pevzner and Hearst, 2002, Computational Linguistics 28(1)), with characters for units and B for the reference.

    With k half the mean length of a step of B, and b(i, j) the number of boundaries after character i and up to character j,
    WindowDiff = sum over i = 0 .. length - k - 1 of [b_A(i, i + k) != b_B(i, i + k)] / (length - k). It is 0 for a text too short for a
    window.
    """
    width = max(1, round(length / (len(cuts_b) + 1) / 2))
    if length <= width:
        return 0.0
    is_different = _counts(cuts_a, length, width) != _counts(cuts_b, length, width)
    return float(is_different.mean())


def _counts(cuts: Sequence[int], length: int, width: int) -> npt.NDArray[np.int64]:
    """Count the boundaries in every window (i, i + width]: an array of length - width counts."""
    marks = np.zeros(length + 1, dtype=np.int64)
    marks[list(cuts)] = 1
    passed = np.cumsum(marks)
    return passed[width:length] - passed[: length - width]
